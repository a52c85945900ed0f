/* Block device work in a guest: `io DEVICE SECONDS` prints `RESULT name operations-per-second bytes-per-second`
 * for each pattern. O_DIRECT and Linux's native asynchronous I/O, so that the guest's page cache has no part. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct pattern {
    const char *name;
    int write, random, block, depth, jobs, sync;
};

static const struct pattern patterns[] = {
    {"seq-read-128k", 0, 0, 131072, 8, 1, 0},   {"seq-write-128k", 1, 0, 131072, 8, 1, 0},
    {"rand-read-4k", 0, 1, 4096, 1, 1, 0},      {"rand-write-4k", 1, 1, 4096, 1, 1, 0},
    {"rand-read-4k-qd32", 0, 1, 4096, 32, 1, 0}, {"rand-write-4k-qd32", 1, 1, 4096, 32, 1, 0},
    {"rand-read-4k-4jobs", 0, 1, 4096, 8, 4, 0}, {"rand-write-4k-fsync", 1, 1, 4096, 1, 1, 1},
};

static const char *path;
static double limit;
static uint64_t size;

struct job {
    const struct pattern *pattern;
    pthread_t thread;
    int number;
    uint64_t done;
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

static void *run(void *argument) {
    struct job *job = argument;
    const struct pattern *p = job->pattern;
    uint64_t random = 88172645463325252ull + job->number * 7919, at = 0, blocks = size / p->block;
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0)
        die(path);
    char *memory;
    if (posix_memalign((void **)&memory, 4096, (size_t)p->block * p->depth))
        die("memory");
    memset(memory, job->number + 1, (size_t)p->block * p->depth);
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, p->depth, &context))
        die("io_setup");
    struct iocb *blocks_of = calloc(p->depth, sizeof *blocks_of), **list = calloc(p->depth, sizeof *list);
    struct io_event *events = calloc(p->depth, sizeof *events);
    int ready = p->depth;
    for (int i = 0; i < p->depth; i++)
        list[i] = &blocks_of[i];
    double end = now() + limit;
    int stop = 0, flying = 0;
    while (!stop || flying) {
        if (!stop && ready) {
            for (int i = 0; i < ready; i++) {
                struct iocb *cb = list[i];
                int slot = cb - blocks_of;
                uint64_t block;
                if (p->random) {
                    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
                    block = random % blocks;
                } else {
                    block = at++ % blocks;
                }
                memset(cb, 0, sizeof *cb);
                cb->aio_fildes = fd;
                cb->aio_lio_opcode = p->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
                cb->aio_buf = (uint64_t)(memory + (size_t)slot * p->block);
                cb->aio_nbytes = p->block;
                cb->aio_offset = block * p->block;
            }
            int put = syscall(SYS_io_submit, context, ready, list);
            if (put != ready)
                die("io_submit");
            flying += put;
            ready = 0;
        }
        int got = syscall(SYS_io_getevents, context, 1, p->depth, events, NULL);
        if (got < 1)
            die("io_getevents");
        for (int i = 0; i < got; i++) {
            if (events[i].res != p->block)
                die("a transfer");
            list[ready++] = (struct iocb *)events[i].obj;
        }
        flying -= got;
        if (p->sync && fsync(fd))
            die("fsync");
        job->done += got;
        stop = now() >= end;
    }
    syscall(SYS_io_destroy, context);
    close(fd);
    free(memory);
    return NULL;
}

int main(int count, char **words) {
    if (count < 3)
        return 2;
    path = words[1];
    limit = atof(words[2]);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
        die(path);
    close(fd);
    for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        const struct pattern *p = &patterns[i];
        struct job jobs[8];
        /* What the pattern before left to be written is not this one's to pay: the more the faster it was. */
        if ((fd = open(path, O_RDWR)) < 0 || fsync(fd))
            die("settling");
        close(fd);
        double start = now();
        for (int n = 0; n < p->jobs; n++) {
            jobs[n] = (struct job){p, 0, n, 0};
            if (pthread_create(&jobs[n].thread, NULL, run, &jobs[n]))
                die("a thread");
        }
        uint64_t done = 0;
        for (int n = 0; n < p->jobs; n++) {
            pthread_join(jobs[n].thread, NULL);
            done += jobs[n].done;
        }
        double took = now() - start;
        printf("RESULT %s %.1f %.0f\n", p->name, done / took, done / took * p->block);
        fflush(stdout);
    }
    return 0;
}
