/* `network echo PORT`: sends each datagram back, in capitals.
 * `network dhcp6 INTERFACE`: asks for an address as a client of DHCPv6 does (RFC 8415, 18.2.1, with rapid commit) and prints it. */
#include <arpa/inet.h>
#include <ctype.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static unsigned char data[65536];

static int bound(int port) {
    struct sockaddr_in6 own = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    if (fd < 0 || bind(fd, (void *)&own, sizeof own))
        exit((perror("bind"), 1));
    return fd;
}

static int echo(int port) {
    int fd = bound(port);
    puts("ECHOES");
    fflush(stdout);
    for (;;) {
        struct sockaddr_in6 from;
        socklen_t len = sizeof from;
        ssize_t n = recvfrom(fd, data, sizeof data, 0, (void *)&from, &len);
        for (ssize_t i = 0; i < n; i++)
            data[i] = toupper(data[i]);
        if (n < 0 || sendto(fd, data, n, 0, (void *)&from, len) < 0)
            return perror("echo"), 1;
    }
}

static int dhcp6(const char *interface) {
    /* Solicit; a client's DUID, an IA_NA, rapid commit. */
    static const unsigned char ask[] = {1, 1, 2, 3, 0, 1, 0, 6, 0, 2, 0, 0, 0xab, 0x11, 0, 3, 0, 12, 9, 9, 9, 9, 0, 0, 0, 0,
                                        0, 0, 0, 0, 0, 14, 0, 0};
    struct sockaddr_in6 servers = {.sin6_family = AF_INET6, .sin6_port = htons(547), .sin6_scope_id = if_nametoindex(interface)};
    struct timeval wait = {.tv_usec = 500000};
    char text[INET6_ADDRSTRLEN];
    int fd = bound(546);
    inet_pton(AF_INET6, "ff02::1:2", &servers.sin6_addr);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    for (int tries = 0; tries < 120; tries++) {
        sendto(fd, ask, sizeof ask, 0, (void *)&servers, sizeof servers);
        ssize_t n = recv(fd, data, sizeof data, 0);
        if (n < 4 || data[0] != 7 || memcmp(data + 1, ask + 1, 3))
            continue;
        /* In the IA_NA (option 3, 12 bytes of its own) the address (option 5). */
        for (ssize_t at = 4, len; at + 4 <= n; at += 4 + len) {
            len = data[at + 2] << 8 | data[at + 3];
            if (data[at + 1] == 3 && len >= 36 && data[at + 17] == 5)
                return printf("%s\n", inet_ntop(AF_INET6, data + at + 20, text, sizeof text)), 0;
        }
    }
    return fputs("no answer\n", stderr), 1;
}

int main(int count, char **words) {
    if (count == 3 && !strcmp(words[1], "echo"))
        return echo(atoi(words[2]));
    if (count == 3 && !strcmp(words[1], "dhcp6"))
        return dhcp6(words[2]);
    return 2;
}
