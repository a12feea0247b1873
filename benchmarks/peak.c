/* How many 8-bit multiply-accumulates a core can do per second, at most: chains of independent
 * vpdpbusd (AVX-512 VNNI, 64 per instruction) or tdpbssd (AMX, 16 * 16 * 64 per instruction) on
 * registers alone.
 *
 *     peak THREADS MILLISECONDS
 *
 * prints one line per instruction: its name and GMAC/s of all threads together, or 0 where the
 * processor or the kernel lacks it. Linux on x86-64, gcc or clang.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define VNNI_MACS 64.0
#define AMX_MACS (16.0 * 16.0 * 64.0)
#define VNNI_BLOCK 1600 /* instructions between two looks at the clock */
#define AMX_BLOCK 160

static double limit; /* seconds */
static pthread_barrier_t start;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 16 accumulators: more than latency times throughput of any processor so far. */
static double vnni(void) {
    double begin = now(), end;
    double blocks = 0;
    do {
        for (int i = 0; i < VNNI_BLOCK / 16; i++)
            __asm__ volatile(
                "vpdpbusd %%zmm17, %%zmm16, %%zmm0\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm1\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm2\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm3\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm4\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm5\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm6\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm7\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm8\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm9\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm10\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm11\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm12\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm13\n\t"
                "vpdpbusd %%zmm17, %%zmm16, %%zmm14\n\tvpdpbusd %%zmm17, %%zmm16, %%zmm15\n\t"
                ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                    "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        blocks++;
        end = now();
    } while (end - begin < limit);
    return blocks * VNNI_BLOCK * VNNI_MACS / (end - begin);
}

/* Four accumulators of two by two tiles, as a matrix product uses them. */
static double amx(void) {
    struct __attribute__((packed)) {
        uint8_t palette, row;
        uint8_t zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = 64;
        config.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    double begin = now(), end;
    double blocks = 0;
    do {
        for (int i = 0; i < AMX_BLOCK / 4; i++)
            __asm__ volatile("tdpbssd %tmm6, %tmm4, %tmm0\n\ttdpbssd %tmm7, %tmm4, %tmm1\n\t"
                             "tdpbssd %tmm6, %tmm5, %tmm2\n\ttdpbssd %tmm7, %tmm5, %tmm3\n\t");
        blocks++;
        end = now();
    } while (end - begin < limit);
    __asm__ volatile("tilerelease");
    return blocks * AMX_BLOCK * AMX_MACS / (end - begin);
}

static int has_vnni(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
}

static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

typedef struct {
    double (*work)(void);
    double rate;
} task;

static void *run(void *argument) {
    task *t = argument;
    pthread_barrier_wait(&start);
    t->rate = t->work();
    return NULL;
}

static double total(double (*work)(void), int threads) {
    pthread_t ids[64];
    task tasks[64];
    double sum = 0;
    pthread_barrier_init(&start, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        tasks[i].work = work;
        if (pthread_create(&ids[i], NULL, run, &tasks[i])) exit(1);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        sum += tasks[i].rate;
    }
    pthread_barrier_destroy(&start);
    return sum / 1e9;
}

int main(int argc, char **argv) {
    int threads = argc == 3 ? atoi(argv[1]) : 0;
    limit = argc == 3 ? atof(argv[2]) / 1e3 : 0;
    if (threads < 1 || threads > 64 || limit <= 0) {
        fprintf(stderr, "usage: peak THREADS MILLISECONDS\n");
        return 2;
    }
    printf("vpdpbusd %.1f\n", has_vnni() ? total(vnni, threads) : 0.0);
    printf("tdpbssd %.1f\n", has_amx() ? total(amx, threads) : 0.0);
    return 0;
}
