// Work for several guest CPUs at once.
//   smp check CPUS [ROUNDS [ITEM]]: each item checks its own result; prints `SMP name ok` or says what is wrong and ends with 1.
//   smp bench THREADS: prints `RESULT name seconds check`, the same work in all whatever the number of threads.
// Built with: cc -O2 -static -pthread -mcx16 -o smp smp.c
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 16, PAGE = 4096 };
static int cpus, rounds;
static const char *item, *only;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void wrong(const char *text, ...) {
    va_list list;
    va_start(list, text);
    printf("SMP %s WRONG: ", item);
    vprintf(text, list);
    printf("\n");
    fflush(stdout);
    _exit(1);
}

static void *pages(size_t count, int rights) {
    void *p = mmap(0, count * PAGE, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) wrong("mmap: %s", strerror(errno));
    return p;
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    // A CPU that is offline leaves the thread where the scheduler wants it.
    sched_setaffinity(0, sizeof set, &set);
}

// All threads begin together, each on its CPU.
static pthread_barrier_t gate;
struct job { void (*work)(int); int number; };
static void *begin(void *argument) {
    struct job *job = argument;
    pin(job->number);
    pthread_barrier_wait(&gate);
    job->work(job->number);
    return 0;
}
static void together(int count, void (*work)(int)) {
    pthread_t threads[MOST];
    struct job jobs[MOST];
    pthread_barrier_init(&gate, 0, count);
    for (int i = 0; i < count; i++) {
        jobs[i] = (struct job){work, i};
        if (pthread_create(&threads[i], 0, begin, &jobs[i])) wrong("no thread");
    }
    for (int i = 0; i < count; i++) pthread_join(threads[i], 0);
    pthread_barrier_destroy(&gate);
}

static uint64_t random_of(uint64_t *seed) {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    return *seed ^= *seed << 17;
}

// Atomic instructions on one word, one of every kind.
static struct {
    uint64_t added, swapped, bits[64], incremented;
    uint32_t narrow;
    uint8_t byte;
    __int128 pair __attribute__((aligned(16)));
} shared __attribute__((aligned(64)));
static void atomics_work(int self) {
    for (int i = 0; i < rounds; i++) {
        __atomic_fetch_add(&shared.added, 3, __ATOMIC_SEQ_CST);
        __asm__ volatile("lock incq %0" : "+m"(shared.incremented));
        __asm__ volatile("lock addb $1, %0" : "+m"(shared.byte));
        uint32_t one = 1;
        __asm__ volatile("lock xaddl %1, %0" : "+m"(shared.narrow), "+r"(one));
        uint64_t old = __atomic_load_n(&shared.swapped, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(&shared.swapped, &old, old + 5, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {}
        uint64_t low = (uint64_t)shared.pair, high = (uint64_t)(shared.pair >> 64);
        for (unsigned char done = 0; !done;)
            __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(done), "+m"(shared.pair), "+a"(low), "+d"(high)
                             : "b"(low + 1), "c"(high + (low + 1 == 0 ? 1 : 0) + 2) : "memory");
        // Each thread has a bit in every word.
        unsigned char was;
        __asm__ volatile("lock btcq %2, %1" : "=@ccc"(was), "+m"(shared.bits[i & 63]) : "r"((uint64_t)self));
        if (was != (i >> 6 & 1)) wrong("bit %d of word %d was %d in round %d", self, i & 63, was, i);
    }
}
static void atomics(void) {
    memset(&shared, 0, sizeof shared);
    together(cpus, atomics_work);
    uint64_t all = (uint64_t)cpus * rounds;
    if (shared.added != all * 3) wrong("xadd: %lu of %lu", shared.added, all * 3);
    if (shared.incremented != all) wrong("inc: %lu of %lu", shared.incremented, all);
    if (shared.byte != (uint8_t)all) wrong("byte: %u of %u", shared.byte, (uint8_t)all);
    if (shared.narrow != (uint32_t)all) wrong("narrow: %u of %u", shared.narrow, (uint32_t)all);
    if (shared.swapped != all * 5) wrong("cmpxchg: %lu of %lu", shared.swapped, all * 5);
    if ((uint64_t)shared.pair != all || (uint64_t)(shared.pair >> 64) != all * 2) wrong("cmpxchg16b");
}

// The same across a cache line and across a page.
static char *split;
static void split_work(int self) {
    (void)self;
    for (int i = 0; i < rounds / 64 + 8; i++)
        for (int at = 0; at < 2; at++) {
            char *p = split + (at ? PAGE - 3 : 64 - 3);
            __asm__ volatile("lock addq $1, (%0)" ::"r"(p) : "memory");
            uint64_t one = 1;
            __asm__ volatile("lock xaddq %0, (%1)" : "+r"(one) : "r"(at ? p : p + 64) : "memory");
        }
}
static void splits(void) {
    split = pages(3, PROT_READ | PROT_WRITE);
    together(cpus, split_work);
    uint64_t all = (uint64_t)cpus * (rounds / 64 + 8), line, line2, page;
    memcpy(&line, split + 61, 8);
    memcpy(&line2, split + 125, 8);
    memcpy(&page, split + PAGE - 3, 8);
    if (line != all || line2 != all) wrong("across a line: %lu, %lu of %lu", line, line2, all);
    if (page != all * 2) wrong("across a page: %lu of %lu", page, all * 2);
    munmap(split, 3 * PAGE);
}

// Locks: a futex mutex, a ticket lock, Peterson's with one fence; what they guard is not atomic.
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static volatile uint64_t guarded[3];
static uint32_t tickets, serving;
static volatile int wants[2], turn;
static void locks_work(int self) {
    for (int i = 0; i < rounds; i++) {
        pthread_mutex_lock(&mutex);
        guarded[0]++;
        pthread_mutex_unlock(&mutex);
        if (i % 4 == 0) {
            uint32_t mine = __atomic_fetch_add(&tickets, 1, __ATOMIC_RELAXED);
            for (int n = 0; __atomic_load_n(&serving, __ATOMIC_ACQUIRE) != mine; n++)
                if (n % 64 == 63) sched_yield();
            guarded[1]++;
            __atomic_store_n(&serving, mine + 1, __ATOMIC_RELEASE);
        }
        if (self < 2) {
            wants[self] = 1;
            turn = !self;
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            for (int n = 0; wants[!self] && turn == !self; n++)
                if (n % 64 == 63) sched_yield();
            guarded[2]++;
            __atomic_store_n(&wants[self], 0, __ATOMIC_RELEASE);
        }
    }
}
static void locks(void) {
    memset((void *)guarded, 0, sizeof guarded);
    tickets = serving = 0;
    together(cpus, locks_work);
    uint64_t all = (uint64_t)cpus * rounds;
    if (guarded[0] != all) wrong("mutex: %lu of %lu", guarded[0], all);
    if (guarded[1] != (uint64_t)cpus * ((rounds + 3) / 4)) wrong("ticket lock: %lu", guarded[1]);
    if (guarded[2] != (uint64_t)(cpus < 2 ? cpus : 2) * rounds) wrong("Peterson: %lu", guarded[2]);
}

// A token goes round by condition variables, then by bare futexes.
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static int token, passes;
static uint32_t futex_word;
static void token_work(int self) {
    for (;;) {
        pthread_mutex_lock(&mutex);
        while (token != self && passes) pthread_cond_wait(&turned, &mutex);
        int left = passes;
        if (left) {
            passes--;
            token = (self + 1) % cpus;
        }
        pthread_cond_broadcast(&turned);
        pthread_mutex_unlock(&mutex);
        if (!left) break;
    }
    for (int i = 0; i < rounds / 32; i++) {
        uint32_t mine = i * cpus + self, seen;
        while ((seen = __atomic_load_n(&futex_word, __ATOMIC_ACQUIRE)) != mine) {
            if (seen > mine) wrong("the futex word is %u in turn %u", seen, mine);
            syscall(SYS_futex, &futex_word, 128, seen, 0, 0, 0);
        }
        __atomic_store_n(&futex_word, mine + 1, __ATOMIC_RELEASE);
        syscall(SYS_futex, &futex_word, 129, MOST, 0, 0, 0);
    }
}
static void tokens(void) {
    token = 0;
    futex_word = 0;
    passes = rounds / 16;
    together(cpus, token_work);
    if (futex_word != (uint32_t)(rounds / 32 * cpus)) wrong("%u turns of %u", futex_word, rounds / 32 * cpus);
}

// One CPU gives an address new pages while the others read it: none may see a page that was taken away before.
static volatile uint64_t *moving;
static uint64_t published;
static int over;
static void remap_work(int self) {
    if (self == 0) {
        for (uint64_t n = 1; n <= (uint64_t)rounds / 16; n++) {
            uint64_t *fresh = pages(1, PROT_READ | PROT_WRITE);
            *fresh = n;
            if (mremap(fresh, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)moving) == MAP_FAILED) wrong("mremap");
            __atomic_store_n(&published, n, __ATOMIC_SEQ_CST);
        }
        __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
    } else
        while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
            uint64_t least = __atomic_load_n(&published, __ATOMIC_SEQ_CST), seen = *moving;
            if (seen < least) wrong("read of page %lu after page %lu was in its place", seen, least);
        }
}
static sigjmp_buf back[MOST];
static _Thread_local int thread_number;
static void on_fault(int signal) {
    (void)signal;
    siglongjmp(back[thread_number], 1);
}
// One CPU takes the right to write away while the others write: then nothing changes any more.
static volatile uint64_t *closing;
static void protect_work(int self) {
    thread_number = self;
    if (self == 0) {
        for (int n = 0; n < rounds / 16; n++) {
            mprotect((void *)closing, PAGE, PROT_READ);
            uint64_t before[MOST];
            for (int i = 0; i < cpus; i++) before[i] = closing[i * 8];
            for (volatile int wait = 0; wait < 200; wait++) {}
            for (int i = 0; i < cpus; i++)
                if (closing[i * 8] != before[i]) wrong("CPU %d wrote a page that was read-only", i);
            mprotect((void *)closing, PAGE, PROT_READ | PROT_WRITE);
            for (volatile int wait = 0; wait < 200; wait++) {}
        }
        __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
    } else {
        while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
            if (sigsetjmp(back[self], 1)) continue;
            for (int i = 0; i < 50; i++) closing[self * 8]++;
        }
    }
}
// Everybody maps, fills, checks and unmaps areas of its own.
static void churn_work(int self) {
    uint64_t seed = self * 77 + 5;
    for (int n = 0; n < rounds / 32; n++) {
        size_t count = 1 + random_of(&seed) % 24;
        uint64_t *area = pages(count, PROT_READ | PROT_WRITE), mark = random_of(&seed);
        for (size_t i = 0; i < count; i++) {
            if (area[i * 512]) wrong("a new page is not empty");
            area[i * 512] = mark + i;
            area[i * 512 + 511] = ~(mark + i);
        }
        if (n % 3 == 0) madvise((char *)area, PAGE, MADV_DONTNEED);
        for (size_t i = n % 3 == 0; i < count; i++)
            if (area[i * 512] != mark + i || area[i * 512 + 511] != ~(mark + i)) wrong("page %lu lost what was written", i);
        if (n % 3 == 0 && area[0]) wrong("a page that was given up kept its content");
        munmap(area, count * PAGE);
    }
}
static void maps(void) {
    moving = pages(1, PROT_READ | PROT_WRITE);
    closing = pages(1, PROT_READ | PROT_WRITE);
    published = over = 0;
    together(cpus, remap_work);
    signal(SIGSEGV, on_fault);
    over = 0;
    together(cpus, protect_work);
    signal(SIGSEGV, SIG_DFL);
    together(cpus, churn_work);
    munmap((void *)moving, PAGE);
    munmap((void *)closing, PAGE);
}

// Forks while other CPUs write: copy-on-write loses no store of the parent and shows the child one moment.
static volatile uint64_t *steps;
static void fork_work(int self) {
    if (self % 2) {
        volatile uint64_t *mine = steps + self * 512;
        uint64_t n = 0;
        while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
            n++;
            mine[0] = n;
            mine[1] = n;
            if (mine[0] != n || mine[1] != n) wrong("a store of CPU %d is lost", self);
        }
        return;
    }
    for (int i = 0; i < rounds / 256 + 4; i++) {
        pid_t child = fork();
        if (child < 0) wrong("fork: %s", strerror(errno));
        if (!child) {
            uint64_t first[MOST], second[MOST];
            for (int n = 1; n < cpus; n += 2) {
                second[n] = steps[n * 512 + 1];
                first[n] = steps[n * 512];
                if (first[n] - second[n] > 1) _exit(2);
                steps[n * 512] = 0;
            }
            for (volatile int wait = 0; wait < 2000; wait++) {}
            for (int n = 1; n < cpus; n += 2)
                if (steps[n * 512] || steps[n * 512 + 1] != second[n]) _exit(3);
            _exit(0);
        }
        int status;
        if (waitpid(child, &status, 0) != child || status)
            wrong("child %d ended with %#x: %s", i, status, status == 0x200 ? "torn stores" : "a page is not its own");
    }
    if (self == 0) __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
}
static void forks(void) {
    steps = pages(MOST, PROT_READ | PROT_WRITE);
    over = 0;
    together(cpus, fork_work);
    munmap((void *)steps, MOST * PAGE);
}

// One CPU rewrites functions, the others call them: after a serializing instruction the new ones run. Functions share pages
// and cache lines with others that are not touched.
static unsigned char *functions;
static uint32_t stamps[8];
static uint32_t call(int n) { return ((uint32_t(*)(void))(functions + n * 32))(); }
static void serialize(void) {
    uint32_t a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)::"memory");
}
static void write_function(int n, uint32_t value) {
    unsigned char *p = functions + n * 32;
    // The immediate lies aligned, so that one store replaces it.
    __atomic_store_n((uint32_t *)(p + 4), value, __ATOMIC_RELEASE);
}
static void rewrite_work(int self) {
    if (self == 0) {
        for (uint32_t n = 1; n <= (uint32_t)rounds / 4; n++) {
            write_function(n % 8, n);
            __atomic_store_n(&stamps[n % 8], n, __ATOMIC_SEQ_CST);
            if (call(n % 8) != n) wrong("CPU 0 does not see its own code");
        }
        __atomic_store_n(&over, 1, __ATOMIC_SEQ_CST);
        return;
    }
    uint64_t seed = self + 1;
    while (!__atomic_load_n(&over, __ATOMIC_SEQ_CST)) {
        int n = random_of(&seed) % 8;
        uint32_t least = __atomic_load_n(&stamps[n], __ATOMIC_SEQ_CST);
        serialize();
        uint32_t got = call(n);
        if (got < least) wrong("CPU %d ran function %d as of %u after %u was written", self, n, got, least);
        if (call(9) != 9999) wrong("the neighbour changed");
    }
    serialize();
    for (int n = 0; n < 8; n++)
        if (call(n) != stamps[n]) wrong("at the end CPU %d runs %u, not %u", self, call(n), stamps[n]);
}
static void rewrites(void) {
    functions = pages(1, PROT_READ | PROT_WRITE | PROT_EXEC);
    memset(stamps, 0, sizeof stamps);
    for (int n = 0; n < 10; n++) {
        // nop; nop; nop; mov eax, imm32; ret
        memcpy(functions + n * 32, "\x90\x90\x90\xb8\0\0\0\0\xc3", 9);
        if (n == 9) write_function(n, 9999);
    }
    over = 0;
    together(cpus, rewrite_work);
    munmap(functions, PAGE);
}

static void item_of(const char *name, void (*work)(void)) {
    item = name;
    if (only && strcmp(only, name)) return;
    double start = now();
    work();
    printf("SMP %s ok %.2f s\n", name, now() - start);
    fflush(stdout);
}

// For measurements: a fixed amount of work, divided among the threads.
static uint64_t sums[MOST];
static void compute_work(int self) {
    uint64_t sum = 0;
    for (unsigned n = 1 + self; n < 1500000; n += cpus)
        for (uint64_t x = n; x != 1; sum++) x = x & 1 ? 3 * x + 1 : x >> 1;
    sums[self] = sum;
}
static void stream_work(int self) {
    enum { N = 4 << 20 };
    uint64_t *v = malloc(N * 8), sum = 0;
    for (int r = self; r < 24; r += cpus) {
        for (int i = 0; i < N; i++) v[i] = i * (uint64_t)r;
        for (int i = 0; i < N; i++) sum += v[i] >> 3;
    }
    free(v);
    sums[self] = sum;
}
static void mutex_work(int self) {
    uint64_t own = self;
    for (int i = self; i < 4000000; i += cpus) {
        pthread_mutex_lock(&mutex);
        guarded[0]++;
        pthread_mutex_unlock(&mutex);
        for (int n = 0; n < 20; n++) random_of(&own);
    }
    sums[self] = 0;
}
static void area_work(int self) {
    uint64_t sum = 0;
    for (int n = self; n < 6000; n += cpus) {
        char *area = pages(16, PROT_READ | PROT_WRITE);
        for (int i = 0; i < 16; i++) area[i * PAGE] = 1, sum++;
        munmap(area, 16 * PAGE);
    }
    sums[self] = sum;
}
static void process_work(int self) {
    uint64_t good = 0;
    for (int n = self; n < 400; n += cpus) {
        pid_t child = fork();
        if (!child) _exit(0);
        int status = 1;
        waitpid(child, &status, 0);
        good += status == 0;
    }
    sums[self] = good;
}
static void measure(const char *name, void (*work)(int)) {
    guarded[0] = 0;
    double start = now();
    together(cpus, work);
    uint64_t sum = guarded[0];
    for (int i = 0; i < cpus; i++) sum += sums[i];
    printf("RESULT %s %.6f %016lx\n", name, now() - start, sum);
    fflush(stdout);
}

int main(int argc, char **argv) {
    cpus = argc > 2 ? atoi(argv[2]) : 2;
    rounds = argc > 3 ? atoi(argv[3]) : 20000;
    only = argc > 4 ? argv[4] : 0;
    if (argc < 3 || cpus < 1 || cpus > MOST) {
        fprintf(stderr, "usage: smp check CPUS [ROUNDS [ITEM]] | smp bench THREADS\n");
        return 2;
    }
    if (!strcmp(argv[1], "bench")) {
        measure("compute", compute_work);
        measure("stream", stream_work);
        measure("mutex", mutex_work);
        measure("map-unmap", area_work);
        measure("fork", process_work);
        printf("SUITE-END\n");
        return 0;
    }
    item_of("atomics", atomics);
    item_of("splits", splits);
    item_of("locks", locks);
    item_of("tokens", tokens);
    item_of("maps", maps);
    item_of("forks", forks);
    item_of("rewrites", rewrites);
    printf("SMP-OK\n");
    return 0;
}
