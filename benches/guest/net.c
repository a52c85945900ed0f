/* Network work between a guest and its host: `net serve` on the host, `net ADDRESS SECONDS` in the guest, which prints
 * `RESULT name amount-per-second unit`. Every figure counts what arrived. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SEND = 1, RECEIVE, ECHO, UDP_SEND, UDP_RECEIVE, UDP_ECHO };
#define PORT 9999
#define CHUNK (256 * 1024)
#define SMALL 64

struct request {
    uint32_t kind;
    float seconds;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    printf("FAILED %s: %s\n", what, strerror(errno));
    exit(1);
}

static void whole(int fd, void *data, size_t len, int out) {
    for (size_t at = 0; at < len;) {
        ssize_t n = out ? send(fd, (char *)data + at, len - at, MSG_NOSIGNAL) : recv(fd, (char *)data + at, len - at, 0);
        if (n <= 0)
            die("a message");
        at += n;
    }
}

static uint64_t pour(int fd, double seconds) {
    static char data[CHUNK];
    uint64_t sum = 0;
    for (double end = now() + seconds; now() < end;) {
        ssize_t n = send(fd, data, sizeof data, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        sum += n;
    }
    shutdown(fd, SHUT_WR);
    return sum;
}

static uint64_t drain(int fd) {
    static char data[CHUNK];
    uint64_t sum = 0;
    for (ssize_t n; (n = recv(fd, data, sizeof data, 0)) > 0;)
        sum += n;
    return sum;
}

static uint64_t udp_send(int fd, double seconds) {
    char data[SMALL] = {1};
    uint64_t count = 0;
    for (double end = now() + seconds; now() < end;)
        for (int i = 0; i < 64; i++)
            count += send(fd, data, sizeof data, 0) == sizeof data;
    return count;
}

/* Counts datagrams until none has come for half a second. */
static uint64_t udp_receive(int fd) {
    char data[2048];
    uint64_t count = 0;
    struct timeval wait = {3, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    while (recv(fd, data, sizeof data, 0) > 0) {
        if (!count++) {
            wait = (struct timeval){0, 500000};
            setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
        }
    }
    return count;
}

static int udp(struct sockaddr_in *peer, int bound) {
    int fd = socket(AF_INET, SOCK_DGRAM, 0), room = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    if (bound) {
        struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PORT)};
        int yes = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(fd, (void *)&any, sizeof any))
            die("bind");
    }
    if (peer && connect(fd, (void *)peer, sizeof *peer))
        die("connect");
    return fd;
}

static void serve_one(int fd) {
    struct request request;
    uint64_t sum = 0;
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    whole(fd, &request, sizeof request, 0);
    char data[2048], byte = 1;
    struct sockaddr_in peer;
    socklen_t len = sizeof peer;
    if (request.kind == SEND)
        sum = drain(fd);
    else if (request.kind == RECEIVE)
        pour(fd, request.seconds);
    else if (request.kind == ECHO)
        for (ssize_t n; (n = recv(fd, data, 1, 0)) > 0;)
            whole(fd, data, n, 1);
    else {
        int datagrams = udp(NULL, 1);
        whole(fd, &byte, 1, 1);
        if (request.kind == UDP_SEND)
            sum = udp_receive(datagrams);
        else {
            struct timeval wait = {1, 0};
            setsockopt(datagrams, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
            for (ssize_t n; (n = recvfrom(datagrams, data, sizeof data, 0, (void *)&peer, &len)) > 0;) {
                if (request.kind == UDP_RECEIVE) {
                    connect(datagrams, (void *)&peer, sizeof peer);
                    udp_send(datagrams, request.seconds);
                    break;
                }
                sendto(datagrams, data, n, 0, (void *)&peer, len);
            }
        }
        close(datagrams);
    }
    if (request.kind == SEND || request.kind == UDP_SEND)
        whole(fd, &sum, sizeof sum, 1);
}

static void serve(void) {
    int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (void *)&any, sizeof any) || listen(fd, 8))
        die("bind");
    for (;;) {
        int one = accept(fd, NULL, NULL);
        if (one < 0)
            die("accept");
        if (!fork()) {
            serve_one(one);
            exit(0);
        }
        close(one);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    }
}

static void report(const char *name, double amount, const char *unit) {
    printf("RESULT %s %.1f %s\n", name, amount, unit);
    fflush(stdout);
}

int main(int count, char **words) {
    if (count == 2 && !strcmp(words[1], "serve"))
        serve();
    if (count < 3)
        return 2;
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    inet_pton(AF_INET, words[1], &peer.sin_addr);
    double seconds = atof(words[2]);
    for (int kind = SEND; kind <= UDP_ECHO; kind++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
        if (connect(fd, (void *)&peer, sizeof peer))
            die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        struct request request = {kind, seconds};
        whole(fd, &request, sizeof request, 1);
        uint64_t sum = 0;
        char data[SMALL] = {1};
        int datagrams = -1;
        if (kind >= UDP_SEND) {
            whole(fd, data, 1, 0);
            datagrams = udp(&peer, 0);
        }
        double start = now();
        switch (kind) {
        case SEND:
            pour(fd, seconds);
            whole(fd, &sum, sizeof sum, 0);
            report("tcp-send", sum / (now() - start) / 1e6, "MB/s");
            break;
        case RECEIVE:
            sum = drain(fd);
            report("tcp-receive", sum / (now() - start) / 1e6, "MB/s");
            break;
        case ECHO:
            while (now() < start + seconds) {
                whole(fd, data, 1, 1);
                whole(fd, data, 1, 0);
                sum++;
            }
            report("tcp-round-trips", sum / (now() - start), "/s");
            break;
        case UDP_SEND:
            udp_send(datagrams, seconds);
            whole(fd, &sum, sizeof sum, 0);
            report("udp-64-send", sum / seconds, "packets/s");
            break;
        case UDP_RECEIVE:
            if (send(datagrams, data, SMALL, 0) < 0)
                die("send");
            report("udp-64-receive", udp_receive(datagrams) / seconds, "packets/s");
            break;
        case UDP_ECHO: {
            struct timeval wait = {0, 200000};
            setsockopt(datagrams, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
            while (now() < start + seconds)
                sum += send(datagrams, data, SMALL, 0) > 0 && recv(datagrams, data, SMALL, 0) > 0;
            report("udp-round-trips", sum / (now() - start), "/s");
        }
        }
        close(fd);
        if (datagrams >= 0)
            close(datagrams);
    }
    return 0;
}
