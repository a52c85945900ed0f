// Work for a guest CPU. Each item prints `RESULT name seconds check`; the check must be the same on every CPU.
// Built with: cc -O2 -static -o suite suite.c
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint64_t seed = 88172645463325252ull;
static uint64_t next(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

// Branches that no predictor and no translator can fold.
static uint64_t integers(void) {
    uint64_t sum = 0;
    for (unsigned n = 1; n < 1000000; n++) {
        uint64_t x = n;
        while (x != 1) {
            x = x & 1 ? 3 * x + 1 : x >> 1;
            sum++;
        }
    }
    return sum;
}

static uint64_t multiply(void) {
    uint64_t a = 0x9e3779b97f4a7c15ull, sum = 0;
    for (unsigned i = 0; i < 90000000; i++) {
        a = a * 6364136223846793005ull + i;
        sum += (uint64_t)(((unsigned __int128)a * (a ^ i)) >> 64);
    }
    return sum;
}

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t sort(void) {
    enum { N = 700000 };
    uint32_t *v = malloc(N * sizeof *v);
    for (int i = 0; i < N; i++) v[i] = next();
    qsort(v, N, sizeof *v, compare);
    uint64_t sum = v[0] ^ v[N / 2] ^ v[N - 1];
    free(v);
    return sum;
}

static __attribute__((noinline)) unsigned fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static uint64_t recursion(void) { return fib(39); }

static uint64_t bytecode(void) {
    static const uint8_t code[] = {0, 1, 2, 3, 4, 2, 5, 1, 6, 3, 7, 0, 4, 6, 5, 8};
    uint64_t a = 1, b = 2;
    for (unsigned round = 0; round < 2500000; round++)
        for (unsigned pc = 0;; pc++) {
            switch (code[pc]) {
            case 0: a += b; continue;
            case 1: b ^= a; continue;
            case 2: a = a << 3 | a >> 61; continue;
            case 3: b -= 7; continue;
            case 4: a ^= round; continue;
            case 5: b += a & 255; continue;
            case 6: if (a & 1) b++; continue;
            case 7: a *= 31; continue;
            }
            break;
        }
    return a ^ b;
}

static uint64_t chase(void) {
    enum { N = 1 << 20 };
    uint32_t *v = malloc(N * sizeof *v);
    for (unsigned i = 0; i < N; i++) v[i] = i;
    for (unsigned i = N - 1; i; i--) {
        unsigned j = next() % i, t = v[i];
        v[i] = v[j];
        v[j] = t;
    }
    uint32_t at = 0;
    for (unsigned i = 0; i < 12000000; i++) at = v[at];
    free(v);
    return at;
}

static uint64_t copy(void) {
    enum { N = 8 << 20 };
    char *a = malloc(N), *b = malloc(N);
    memset(a, 7, N);
    for (int i = 0; i < 120; i++) {
        memcpy(b, a, N);
        a[i] = b[i + 1] + 1;
    }
    uint64_t sum = b[1] + b[N - 1];
    free(a);
    free(b);
    return sum;
}

static uint64_t floats(void) {
    enum { N = 260 };
    static double a[N][N], b[N][N], c[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) a[i][j] = i + j * 0.5, b[i][j] = i - j * 0.25, c[i][j] = 0;
    for (int r = 0; r < 30; r++)
        for (int i = 0; i < N; i++)
            for (int k = 0; k < N; k++)
                for (int j = 0; j < N; j++) c[i][j] += a[i][k] * b[k][j];
    uint64_t bits;
    memcpy(&bits, &c[N / 3][N / 2], 8);
    return bits;
}

static uint64_t syscalls(void) {
    uint64_t same = 1;
    for (int i = 0; i < 400000; i++) same &= syscall(SYS_getppid) >= 0;
    return same;
}

static uint64_t pipes(void) {
    int a[2], b[2];
    char c = 1;
    if (pipe(a) || pipe(b)) exit(1);
    pid_t child = fork();
    if (!child) {
        close(a[1]);
        while (read(a[0], &c, 1) == 1)
            if (write(b[1], &c, 1) != 1) break;
        _exit(0);
    }
    for (int i = 0; i < 20000; i++)
        if (write(a[1], &c, 1) != 1 || read(b[0], &c, 1) != 1) exit(1);
    close(a[1]);
    waitpid(child, 0, 0);
    return c;
}

static char *self;
static uint64_t forks(void) {
    uint64_t good = 0;
    for (int i = 0; i < 200; i++) {
        pid_t child = fork();
        if (!child) {
            execl(self, self, "--exit", (char *)0);
            _exit(1);
        }
        int status;
        waitpid(child, &status, 0);
        good += WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    return good;
}

static uint64_t faults(void) {
    uint64_t sum = 0;
    enum { N = 128 << 20 };
    for (int r = 0; r < 2; r++) {
        char *p = mmap(0, N, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(p, N, MADV_NOHUGEPAGE);
        for (size_t i = 0; i < N; i += 4096) p[i] = 1, sum++;
        munmap(p, N);
    }
    return sum;
}

// mov eax, imm32; ret — the constant is rewritten before every call.
static uint64_t rewriting(void) {
    unsigned char *p = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    for (uint32_t i = 0; i < 20000; i++) {
        p[0] = 0xb8;
        memcpy(p + 1, &i, 4);
        p[5] = 0xc3;
        sum += ((uint32_t(*)(void))p)();
    }
    munmap(p, 4096);
    return sum;
}

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
#define ROT(x, n) ((x) >> (n) | (x) << (32 - (n)))
static uint64_t sha256(void) {
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, w[64];
    for (int block = 0; block < 400000; block++) {
        for (int i = 0; i < 16; i++) w[i] = block * 16 + i;
        for (int i = 16; i < 64; i++)
            w[i] = w[i - 16] + (ROT(w[i - 15], 7) ^ ROT(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                   (ROT(w[i - 2], 17) ^ ROT(w[i - 2], 19) ^ w[i - 2] >> 10);
        uint32_t s[8];
        memcpy(s, h, sizeof s);
        for (int i = 0; i < 64; i++) {
            uint32_t a = s[7] + (ROT(s[4], 6) ^ ROT(s[4], 11) ^ ROT(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
            uint32_t b = (ROT(s[0], 2) ^ ROT(s[0], 13) ^ ROT(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            memmove(s + 1, s, 28);
            s[4] += a;
            s[0] = a + b;
        }
        for (int i = 0; i < 8; i++) h[i] += s[i];
    }
    return (uint64_t)h[0] << 32 | h[7];
}

static void measure(const char *name, uint64_t (*work)(void)) {
    double start = now();
    uint64_t check = work();
    printf("RESULT %s %.6f %016llx\n", name, now() - start, (unsigned long long)check);
    fflush(stdout);
}

static int shell(const char *name, const char *command) {
    double start = now();
    int status = system(command);
    printf("RESULT %s %.6f %d\n", name, now() - start, status);
    fflush(stdout);
    return status;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--exit")) return 0;
    self = argv[0];
    measure("integer", integers);
    measure("multiply", multiply);
    measure("sort", sort);
    measure("recursion", recursion);
    measure("bytecode", bytecode);
    measure("pointer-chase", chase);
    measure("memcpy", copy);
    measure("float", floats);
    measure("syscall", syscalls);
    measure("pipe", pipes);
    measure("fork-exec", forks);
    measure("page-fault", faults);
    measure("code-rewrite", rewriting);
    measure("sha256", sha256);
    // Text that compresses as text does.
    FILE *f = fopen("/tmp/text", "w");
    for (int i = 0; f && i < 300000; i++) {
        uint64_t r = next();
        fprintf(f, "%llu line %d of %llx words\n", (unsigned long long)(r % 1000), i, (unsigned long long)(r >> 40));
    }
    if (f) fclose(f);
    shell("gzip", "gzip -c /tmp/text > /tmp/text.gz");
    shell("gunzip", "gunzip -c /tmp/text.gz > /dev/null");
    shell("awk", "awk '{ s += $1; n[$1]++ } END { print s, length(n) }' /tmp/text > /dev/null");
    shell("shell", "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done");
    shell("sort-text", "sort /tmp/text > /dev/null");
    printf("SUITE-END\n");
    return 0;
}
