/* `vsock listen PORT`: takes one connection and sends back what it reads, in capitals.
 * `vsock connect PORT WORD`: connects to the host, sends the word and prints the answer. */
#include <ctype.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **words) {
    char data[65536];
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = count > 2 ? atoi(words[2]) : 0};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (count == 3 && !strcmp(words[1], "listen")) {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(fd, (void *)&address, sizeof address) || listen(fd, 1))
            return perror("listen"), 1;
        puts("LISTENING");
        fflush(stdout);
        int one = accept(fd, NULL, NULL);
        for (ssize_t n; (n = read(one, data, sizeof data)) > 0;) {
            for (ssize_t i = 0; i < n; i++)
                data[i] = toupper((unsigned char)data[i]);
            for (ssize_t at = 0, w; at < n; at += w)
                if ((w = write(one, data + at, n - at)) <= 0)
                    return perror("write"), 1;
        }
        close(one);
        return 0;
    }
    if (count != 4)
        return 2;
    address.svm_cid = VMADDR_CID_HOST;
    if (connect(fd, (void *)&address, sizeof address))
        return perror("connect"), 1;
    if (write(fd, words[3], strlen(words[3])) < 0)
        return perror("write"), 1;
    shutdown(fd, SHUT_WR);
    printf("ANSWER ");
    for (ssize_t n; (n = read(fd, data, sizeof data)) > 0;)
        fwrite(data, 1, n, stdout);
    puts("");
    return 0;
}
