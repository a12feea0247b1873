/* What every compiled program needs around it: conversion between floats and codes, working memory,
   threads, and the way in from Python.

   A compiled program is a shared object that exports one `intact_module`. An engine is a loaded
   module, the grids of its input and output, and its arenas (the working memory of one thread).

   Compiled once per compiler and Python version, for any CPU of the architecture; what depends on
   the CPU is chosen when it runs. With INTACT_PYTHON it is an extension module, else its functions
   are called through ctypes. It is never unloaded: its threads and its fork handlers live in it. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* for CPU affinity */
#endif

#ifdef INTACT_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint32_t abi;
    uint32_t input_bytes;
    uint32_t output_bytes;
    uint32_t block;
    uint64_t arena_bytes;
    uint64_t trace_bytes;
    void (*init)(void *arena);
    void (*run)(const uint8_t *input, uint8_t *output, uint32_t n, void *arena);
    void (*trace)(const uint8_t *input, uint8_t *output, uint8_t *traced, void *arena);
    uint32_t amx;
} intact_module;

#define ABI 1
#define ALIGNMENT 64
#define MAX_WORKERS 1023
#define SPIN_NS 30000          /* an idle thread looks for work for so long before it sleeps */
#define KEEP_GIL_NS 4000       /* shorter work does not pay for releasing the GIL */
#define SHARE_NS 20000         /* shorter work does not pay for waking a thread */
#define QUICK_NS 1000000       /* a sample that takes less is timed more than once */

INLINE uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

INLINE void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- the CPU ------------------------------------------------------------------------------- */

#if defined(__x86_64__)
static uint64_t enabled_state(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))
        return 0; /* the operating system saves no extended state */
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}
#endif

/* Names of the features that CPU and operating system offer, separated by spaces, in the spelling
   of compiler flags. */
EXPORT const char *intact_features(void)
{
    static char names[160];
    char found[160] = "";
#if defined(__x86_64__)
    const uint64_t state = enabled_state();
    const bool avx = (state & 0x06) == 0x06;            /* SSE and AVX registers */
    const bool avx512 = (state & 0xe6) == 0xe6;         /* and opmask and ZMM registers */
    const bool amx = (state & 0x60000) == 0x60000;      /* tile configuration and tile data */
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        if (avx && (b >> 5 & 1)) strcat(found, "avx2 ");
        if (avx512 && (b >> 16 & 1)) strcat(found, "avx512f ");
        if (avx512 && (b >> 17 & 1)) strcat(found, "avx512dq ");
        if (avx512 && (b >> 30 & 1)) strcat(found, "avx512bw ");
        if (avx512 && (b >> 31 & 1)) strcat(found, "avx512vl ");
        if (avx512 && (c >> 11 & 1)) strcat(found, "avx512vnni ");
        if (avx512 && (c >> 1 & 1)) strcat(found, "avx512vbmi ");
        if (amx && (d >> 24 & 1)) strcat(found, "amx-tile ");
        if (amx && (d >> 25 & 1)) strcat(found, "amx-int8 ");
    }
#endif
    strcpy(names, found);
    return names;
}

/* What distinguishes this model of CPU from others: results of checks hold for one model. */
EXPORT const char *intact_cpu(void)
{
    static char text[80];
#if defined(__x86_64__)
    unsigned a, b, c, d, model = 0;
    char vendor[13] = "";
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        memcpy(vendor, &b, 4);
        memcpy(vendor + 4, &d, 4);
        memcpy(vendor + 8, &c, 4);
    }
    __get_cpuid(1, &model, &b, &c, &d);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        b = c = d = 0;
    snprintf(text, sizeof text, "%s %08x %08x %08x %08x", vendor, model, b, c, d);
#endif
    return text;
}

/* Ask the operating system to let this process use AMX tiles. 0: granted. */
EXPORT int intact_request_amx(void)
{
#if defined(__linux__) && defined(__x86_64__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 0 : errno;
#else
    return -1;
#endif
}

/* ---- floats and codes: arithmetic.md, section 1 ----------------------------------------------- */

typedef struct {
    float scale;
    float factor; /* 1 / scale where multiplying by it is the same as dividing, else 0 */
    float low, high; /* qmin and qmax less the zero point */
    int32_t zero_point;
    uint8_t qmin; /* as a byte */
    uint8_t span; /* qmax - qmin */
    bool is_signed;
} grid;

/* clamp(rint(x / scale), low, high) + zero_point; false if there is a NaN. The bounds are integers,
   so clamping first changes nothing, and adding 1.5 * 2**23 rounds a small number to an integer,
   half to even, which then stands in the low bits of the sum. */
INLINE bool quantize_body(const float *restrict x, uint8_t *restrict q, size_t n, const grid *g,
                          bool divide)
{
    const float scale = g->scale, factor = g->factor, low = g->low, high = g->high;
    const uint32_t zero_point = (uint32_t)g->zero_point;
    uint32_t nan = 0;
    for (size_t i = 0; i < n; i++) {
        nan |= x[i] != x[i];
        float v = divide ? x[i] / scale : x[i] * factor;
        v = v > low ? v : low;
        v = v < high ? v : high;
        v += 12582912.0f;
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        q[i] = (uint8_t)(bits + zero_point);
    }
    return !nan;
}

INLINE bool quantize_any(const float *x, uint8_t *q, size_t n, const grid *g)
{
    return g->factor != 0 ? quantize_body(x, q, n, g, false) : quantize_body(x, q, n, g, true);
}

/* scale * (q - zero_point) */
INLINE void dequantize_any(const uint8_t *restrict q, float *restrict x, size_t n, const grid *g)
{
    const float scale = g->scale;
    const int32_t zero_point = g->zero_point;
    if (g->is_signed)
        for (size_t i = 0; i < n; i++)
            x[i] = (float)((int32_t)(int8_t)q[i] - zero_point) * scale;
    else
        for (size_t i = 0; i < n; i++)
            x[i] = (float)((int32_t)q[i] - zero_point) * scale;
}

INLINE bool within_any(const uint8_t *q, size_t n, const grid *g)
{
    const uint8_t qmin = g->qmin, span = g->span;
    uint8_t outside = 0;
    for (size_t i = 0; i < n; i++)
        outside |= (uint8_t)(q[i] - qmin) > span;
    return !outside;
}

typedef struct {
    bool (*quantize)(const float *x, uint8_t *q, size_t n, const grid *g);
    void (*dequantize)(const uint8_t *q, float *x, size_t n, const grid *g);
    bool (*within)(const uint8_t *q, size_t n, const grid *g);
} conversions;

#define CONVERSIONS(name, target)                                                                  \
    target static bool quantize_##name(const float *x, uint8_t *q, size_t n, const grid *g)        \
    {                                                                                              \
        return quantize_any(x, q, n, g);                                                           \
    }                                                                                              \
    target static void dequantize_##name(const uint8_t *q, float *x, size_t n, const grid *g)      \
    {                                                                                              \
        dequantize_any(q, x, n, g);                                                                \
    }                                                                                              \
    target static bool within_##name(const uint8_t *q, size_t n, const grid *g)                    \
    {                                                                                              \
        return within_any(q, n, g);                                                                \
    }                                                                                              \
    static const conversions name = {quantize_##name, dequantize_##name, within_##name};

CONVERSIONS(portable, )
#if defined(__x86_64__)
CONVERSIONS(avx2, __attribute__((target("avx2"))))
CONVERSIONS(avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

static const conversions *convert = &portable;

static void choose_conversions(void)
{
#if defined(__x86_64__)
    const char *found = intact_features();
    if (strstr(found, "avx512f ") && strstr(found, "avx512bw ") && strstr(found, "avx512vl ") &&
        strstr(found, "avx512dq "))
        convert = &avx512;
    else if (strstr(found, "avx2 "))
        convert = &avx2;
#endif
}

/* ---- engines and arenas ----------------------------------------------------------------------- */

typedef struct arena {
    struct arena *next;
    uint8_t *memory; /* the module's */
    uint8_t *input, *output; /* codes of one block */
} arena;

typedef struct engine {
    void *library;
    const intact_module *module;
    grid input, output;
    uint32_t threads;
    uint64_t sample_ns;
    _Atomic(arena *) spare; /* the arena that was used last: its memory is in the cache */
    arena *idle;            /* the others; under `arenas_lock` */
} engine;

static pthread_mutex_t arenas_lock = PTHREAD_MUTEX_INITIALIZER;

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static arena *new_arena(const intact_module *m)
{
    const size_t head = aligned(sizeof(arena)), memory = aligned(m->arena_bytes);
    const size_t input = aligned((size_t)m->block * m->input_bytes);
    const size_t output = aligned((size_t)m->block * m->output_bytes);
    void *all;
    if (posix_memalign(&all, ALIGNMENT, head + memory + input + output))
        return NULL;
    arena *a = all;
    a->next = NULL;
    a->memory = (uint8_t *)all + head;
    a->input = a->memory + memory;
    a->output = a->input + input;
    m->init(a->memory);
    return a;
}

static arena *take_arena(engine *e)
{
    arena *a = atomic_exchange(&e->spare, NULL);
    if (a)
        return a;
    pthread_mutex_lock(&arenas_lock);
    a = e->idle;
    if (a)
        e->idle = a->next;
    pthread_mutex_unlock(&arenas_lock);
    return a ? a : new_arena(e->module);
}

static void return_arena(engine *e, arena *a)
{
    a = atomic_exchange(&e->spare, a);
    if (!a)
        return;
    pthread_mutex_lock(&arenas_lock);
    a->next = e->idle;
    e->idle = a;
    pthread_mutex_unlock(&arenas_lock);
}

/* ---- jobs: a batch, in chunks that threads take until none is left ----------------------------- */

enum { DONE = 0, BAD_INPUT = 1, NO_MEMORY = 2 };

typedef struct job {
    engine *engine;
    const uint8_t *codes; /* the input: either codes */
    const float *real;    /* or floats */
    uint8_t *out_codes;   /* the output likewise */
    float *out_real;
    uint8_t *traced;      /* where the traced tensors go, or NULL: then one sample at a time */
    size_t n;
    uint32_t threads;
    atomic_size_t next;   /* the first sample that nobody has taken */
    atomic_int status;
    uint32_t joined;      /* workers that took part; under `pool_lock`, as are the next two */
    atomic_uint active;   /* and those that still do */
    struct job *following;
} job;

static void process(job *j, arena *a, size_t start, size_t count)
{
    engine *e = j->engine;
    const intact_module *m = e->module;
    for (size_t done; count; start += done, count -= done) {
        done = j->traced ? 1 : count < m->block ? count : m->block;
        const uint8_t *input = a->input;
        if (j->real) {
            const float *x = j->real + start * m->input_bytes;
            if (!convert->quantize(x, a->input, done * m->input_bytes, &e->input)) {
                atomic_store(&j->status, BAD_INPUT);
                return;
            }
        } else {
            input = j->codes + start * m->input_bytes;
            if (e->input.span != 255 && !convert->within(input, done * m->input_bytes, &e->input)) {
                atomic_store(&j->status, BAD_INPUT);
                return;
            }
        }
        uint8_t *output = j->out_real ? a->output : j->out_codes + start * m->output_bytes;
        if (j->traced)
            m->trace(input, output, j->traced + start * m->trace_bytes, a->memory);
        else
            m->run(input, output, (uint32_t)done, a->memory);
        if (j->out_real)
            convert->dequantize(output, j->out_real + start * m->output_bytes,
                                done * m->output_bytes, &e->output);
    }
}

/* Whole blocks while there are enough for all; the rest in ever smaller parts, so that all threads
   end at about the same time. */
static size_t chunk(const job *j, size_t left)
{
    const size_t block = j->engine->module->block, least = block / 4 ? block / 4 : 1;
    if (left >= block * j->threads)
        return block;
    size_t part = (left + j->threads - 1) / j->threads;
    part = part > block ? block : part < least ? least : part;
    return part < left ? part : left;
}

static void work(job *j)
{
    arena *a = take_arena(j->engine);
    if (!a) {
        atomic_store(&j->status, NO_MEMORY);
        return;
    }
    if (j->threads == 1)
        process(j, a, 0, j->n);
    else
        for (size_t start = atomic_load(&j->next); start < j->n && !atomic_load(&j->status);) {
            const size_t count = chunk(j, j->n - start);
            if (atomic_compare_exchange_weak(&j->next, &start, start + count)) {
                process(j, a, start, count);
                start = atomic_load(&j->next);
            }
        }
    return_arena(j->engine, a);
}

/* ---- the pool: one for the process, its threads start when first needed ------------------------- */

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_arrived = PTHREAD_COND_INITIALIZER;
static pthread_cond_t worker_left = PTHREAD_COND_INITIALIZER;
static job *jobs;
static uint32_t workers, sleepers;
static pthread_t worker_threads[MAX_WORKERS];
static atomic_uint submissions; /* changes whenever there is something new to look for */
static bool stopping;

/* The kernel may put a thread that it wakes on the CPU of the one that woke it, and leave both there
   for whole calls while another CPU idles: a batch then takes as long as on one thread. So workers
   note where they run, and the thread that submits keeps those that ran on its own CPU off it. */
#if defined(__linux__)
static atomic_int worker_cpu[MAX_WORKERS];
static int kept_off[MAX_WORKERS]; /* a CPU, or -1; under `pool_lock` */

static void note_cpu(uint32_t me)
{
    atomic_store_explicit(&worker_cpu[me], sched_getcpu(), memory_order_relaxed);
}

static void forget_cpu(uint32_t me)
{
    atomic_store(&worker_cpu[me], -1);
    kept_off[me] = -1;
}

static void keep_apart(uint32_t count) /* with `pool_lock` held */
{
    const int here = sched_getcpu();
    cpu_set_t others;
    for (uint32_t i = 0; i < count && i < workers; i++) {
        if (here < 0 || atomic_load_explicit(&worker_cpu[i], memory_order_relaxed) != here ||
            kept_off[i] == here)
            continue;
        if (sched_getaffinity(0, sizeof others, &others)) /* more CPUs than a set holds */
            return;
        CPU_CLR(here, &others);
        if (CPU_COUNT(&others) && !pthread_setaffinity_np(worker_threads[i], sizeof others, &others))
            kept_off[i] = here;
    }
}
#else
static void note_cpu(uint32_t me) { (void)me; }
static void forget_cpu(uint32_t me) { (void)me; }
static void keep_apart(uint32_t count) { (void)count; }
#endif

static job *open_job(void)
{
    for (job *j = jobs; j; j = j->following)
        if (j->joined + 1 < j->threads && atomic_load(&j->next) < j->n)
            return j;
    return NULL;
}

static void *worker(void *number)
{
    const uint32_t me = (uint32_t)(uintptr_t)number;
    pthread_mutex_lock(&pool_lock);
    while (!stopping) {
        job *j = open_job();
        if (!j) {
            const unsigned seen = atomic_load(&submissions);
            pthread_mutex_unlock(&pool_lock);
            const uint64_t end = now_ns() + SPIN_NS;
            while (atomic_load(&submissions) == seen && now_ns() < end)
                relax();
            pthread_mutex_lock(&pool_lock);
            if (atomic_load(&submissions) == seen && !stopping) {
                sleepers++;
                pthread_cond_wait(&work_arrived, &pool_lock);
                sleepers--;
            }
            continue;
        }
        j->joined++;
        atomic_fetch_add(&j->active, 1);
        pthread_mutex_unlock(&pool_lock);
        note_cpu(me);
        work(j);
        pthread_mutex_lock(&pool_lock);
        if (atomic_fetch_sub(&j->active, 1) == 1) /* the last touch of a job that may now be gone */
            pthread_cond_broadcast(&worker_left);
    }
    pthread_mutex_unlock(&pool_lock);
    return NULL;
}

static void start_workers(uint32_t wanted) /* with `pool_lock` held */
{
    if (wanted > MAX_WORKERS)
        wanted = MAX_WORKERS;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's business */
    for (int failed = 0; workers < wanted && !failed; workers += !failed) {
        forget_cpu(workers);
        failed = pthread_create(&worker_threads[workers], NULL, worker, (void *)(uintptr_t)workers);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void share(job *j)
{
    pthread_mutex_lock(&pool_lock);
    if (workers + 1 < j->threads)
        start_workers(j->threads - 1);
    keep_apart(j->threads - 1);
    j->following = jobs;
    jobs = j;
    atomic_fetch_add(&submissions, 1);
    if (sleepers)
        pthread_cond_broadcast(&work_arrived);
    pthread_mutex_unlock(&pool_lock);

    work(j);

    pthread_mutex_lock(&pool_lock);
    for (job **link = &jobs; *link; link = &(*link)->following)
        if (*link == j) {
            *link = j->following; /* from here on nobody joins */
            break;
        }
    pthread_mutex_unlock(&pool_lock);
    const uint64_t end = now_ns() + SPIN_NS;
    while (atomic_load(&j->active) && now_ns() < end)
        relax();
    pthread_mutex_lock(&pool_lock);
    while (atomic_load(&j->active))
        pthread_cond_wait(&worker_left, &pool_lock);
    pthread_mutex_unlock(&pool_lock);
}

/* End the pool's threads. Work that comes later starts new ones. */
EXPORT void intact_stop(void)
{
    pthread_mutex_lock(&pool_lock);
    const uint32_t ending = workers;
    stopping = true;
    atomic_fetch_add(&submissions, 1);
    pthread_cond_broadcast(&work_arrived);
    pthread_mutex_unlock(&pool_lock);
    for (uint32_t i = 0; i < ending; i++)
        pthread_join(worker_threads[i], NULL);
    pthread_mutex_lock(&pool_lock);
    stopping = false;
    workers = 0;
    pthread_mutex_unlock(&pool_lock);
}

/* A child of fork() has one thread: it starts with an empty pool. */
static void before_fork(void)
{
    pthread_mutex_lock(&pool_lock);
    pthread_mutex_lock(&arenas_lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&arenas_lock);
    pthread_mutex_unlock(&pool_lock);
}

static void after_fork_in_child(void)
{
    jobs = NULL;
    workers = sleepers = 0;
    stopping = false;
    pthread_mutex_init(&arenas_lock, NULL);
    pthread_mutex_init(&pool_lock, NULL);
    pthread_cond_init(&work_arrived, NULL);
    pthread_cond_init(&worker_left, NULL);
}

static void set_up(void)
{
    choose_conversions();
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static pthread_once_t set_up_once = PTHREAD_ONCE_INIT;

/* ---- engines ---------------------------------------------------------------------------------- */

EXPORT void intact_free(engine *e)
{
    free(atomic_exchange(&e->spare, NULL)); /* its `next` is of when it was idle */
    for (arena *a = e->idle; a;) {
        arena *next = a->next;
        free(a);
        a = next;
    }
    dlclose(e->library);
    free(e);
}

static grid make_grid(float scale, float factor, int32_t zero_point, int32_t qmin, int32_t qmax)
{
    grid g = {scale, factor, (float)(qmin - zero_point), (float)(qmax - zero_point), zero_point,
              (uint8_t)qmin, (uint8_t)(qmax - qmin), qmin < 0};
    return g;
}

static int execute(job *j)
{
    engine *e = j->engine;
    const size_t blocks = j->n / (e->module->block / 4 ? e->module->block / 4 : 1);
    j->threads = j->n * e->sample_ns < SHARE_NS ? 1 : e->threads;
    if (j->threads > blocks)
        j->threads = blocks ? (uint32_t)blocks : 1;
    if (j->threads == 1)
        work(j);
    else
        share(j);
    return atomic_load(&j->status);
}

/* How long a sample takes, and pages and caches made ready: whether to release the GIL and to wake
   threads depends on it. */
static bool warm_up(engine *e)
{
    const intact_module *m = e->module;
    arena *a = take_arena(e);
    if (!a)
        return false;
    memset(a->input, e->input.qmin, m->input_bytes);
    e->sample_ns = UINT64_MAX;
    for (int i = 0; i < 3; i++) {
        const uint64_t start = now_ns();
        m->run(a->input, a->output, 1, a->memory);
        const uint64_t taken = now_ns() - start;
        e->sample_ns = taken < e->sample_ns ? taken : e->sample_ns;
        if (taken > QUICK_NS)
            break;
    }
    return_arena(e, a);
    return true;
}

/* Load a compiled program. On failure NULL, and the reason in `error`. The input's factor is
   1 / scale where that is exact, else 0; a type is signed where its `lowest` code is negative. */
EXPORT engine *intact_load(const char *path, uint32_t threads, float in_scale, float in_factor,
                           int32_t in_zero_point, int32_t in_qmin, int32_t in_qmax, bool in_signed,
                           float out_scale, int32_t out_zero_point, bool out_signed, char *error,
                           size_t error_bytes)
{
    pthread_once(&set_up_once, set_up);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(error, error_bytes, "%s", dlerror());
        return NULL;
    }
    const intact_module *m = dlsym(library, "intact_program");
    engine *e = NULL;
    if (!m || m->abi != ABI || !m->block || !m->input_bytes || !m->output_bytes)
        snprintf(error, error_bytes, "%s holds no program of version %d", path, ABI);
    else if (m->amx && intact_request_amx())
        snprintf(error, error_bytes, "the operating system does not allow AMX");
    else if (!(e = calloc(1, sizeof *e)))
        snprintf(error, error_bytes, "out of memory");
    if (!e) {
        dlclose(library);
        return NULL;
    }
    e->library = library;
    e->module = m;
    e->threads = threads;
    e->input = make_grid(in_scale, in_factor, in_zero_point, in_qmin, in_qmax);
    e->input.is_signed = in_signed;
    e->output = make_grid(out_scale, 0, out_zero_point, 0, 255);
    e->output.is_signed = out_signed;
    if (!warm_up(e)) {
        snprintf(error, error_bytes, "no memory for %llu bytes of working memory",
                 (unsigned long long)m->arena_bytes);
        intact_free(e);
        return NULL;
    }
    return e;
}

EXPORT const intact_module *intact_module_of(const engine *e)
{
    return e->module;
}

/* Run a batch: one of `codes` and `real` in, one of `out_codes` and `out_real` out; `traced` may be
   NULL. 0, or 1 if the input holds a NaN or a code outside of its range, or 2 if memory is short. */
EXPORT int intact_run(engine *e, const uint8_t *codes, const float *real, uint8_t *out_codes,
                      float *out_real, uint8_t *traced, size_t n)
{
    job j = {.engine = e, .codes = codes, .real = real, .out_codes = out_codes,
             .out_real = out_real, .traced = traced, .n = n};
    return execute(&j);
}

/* ---- a process that tries AMX ------------------------------------------------------------------ */

#ifdef INTACT_PROBE_AMX
#include <immintrin.h>

/* 16 x 16 dot products of 64 signed bytes. Status 0 if all are right. */
int main(void)
{
    static __attribute__((aligned(64))) int8_t a[16][64], b[16][64];
    static __attribute__((aligned(64))) int32_t c[16][16];
    static __attribute__((aligned(64))) struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    if (intact_request_amx())
        return 1;
    for (int i = 0; i < 3; i++) {
        tiles.row_bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 64; k++) {
            a[i][k] = (int8_t)(37 * i + 11 * k - 128);
            b[i][k] = (int8_t)(53 * i - 29 * k + 5);
        }
    _tile_loadconfig(&tiles);
    _tile_zero(0);
    _tile_loadd(1, a, 64);
    _tile_loadd(2, b, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, c, 64);
    _tile_release();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            int32_t sum = 0;
            for (int k = 0; k < 64; k++)
                sum += a[i][k] * b[k / 4][4 * j + k % 4];
            if (sum != c[i][j])
                return 2;
        }
    return 0;
}
#endif

/* ---- Python ----------------------------------------------------------------------------------- */

#ifdef INTACT_PYTHON

typedef struct {
    PyObject_HEAD
    engine *engine;
    PyObject *empty, *code_dtype, *byte_dtype, *float_dtype; /* of NumPy */
    PyObject *output_shape;                                  /* of one sample */
    PyObject *one;                                           /* of a batch of one */
    char code_format;                                        /* of the input */
    int input_ndim;
    Py_ssize_t input_shape[8];
} EngineObject;

static int engine_init(EngineObject *self, PyObject *args, PyObject *keywords)
{
    const char *path;
    unsigned threads;
    float in_scale, in_factor, out_scale;
    int in_zero, in_qmin, in_qmax, in_signed, out_zero, out_signed;
    PyObject *shape;
    char error[1024];
    (void)keywords;
    if (self->engine) {
        PyErr_SetString(PyExc_RuntimeError, "an engine is loaded once");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "sIffiiipfipO!O!OOOO", &path, &threads, &in_scale, &in_factor,
                          &in_zero, &in_qmin, &in_qmax, &in_signed, &out_scale, &out_zero,
                          &out_signed, &PyTuple_Type, &shape, &PyTuple_Type, &self->output_shape,
                          &self->empty, &self->code_dtype, &self->byte_dtype, &self->float_dtype)) {
        self->output_shape = self->empty = self->code_dtype = self->byte_dtype = NULL;
        self->float_dtype = NULL;
        return -1;
    }
    Py_INCREF(self->output_shape);
    Py_INCREF(self->empty);
    Py_INCREF(self->code_dtype);
    Py_INCREF(self->byte_dtype);
    Py_INCREF(self->float_dtype);
    if (PyTuple_GET_SIZE(shape) > 8) {
        PyErr_SetString(PyExc_ValueError, "a tensor has at most 8 dimensions");
        return -1;
    }
    self->input_ndim = (int)PyTuple_GET_SIZE(shape);
    for (int i = 0; i < self->input_ndim; i++)
        self->input_shape[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i));
    self->code_format = in_signed ? 'b' : 'B';
    PyObject *one = Py_BuildValue("(i)", 1);
    if (one)
        self->one = PySequence_Concat(one, self->output_shape);
    Py_XDECREF(one);
    if (PyErr_Occurred())
        return -1;
    Py_BEGIN_ALLOW_THREADS
    self->engine = intact_load(path, threads, in_scale, in_factor, in_zero, in_qmin, in_qmax,
                               in_signed, out_scale, out_zero, out_signed, error, sizeof error);
    Py_END_ALLOW_THREADS
    if (!self->engine) {
        PyErr_SetString(PyExc_OSError, error);
        return -1;
    }
    return 0;
}

static void engine_dealloc(EngineObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->engine)
        intact_free(self->engine);
    Py_XDECREF(self->empty);
    Py_XDECREF(self->code_dtype);
    Py_XDECREF(self->byte_dtype);
    Py_XDECREF(self->float_dtype);
    Py_XDECREF(self->output_shape);
    Py_XDECREF(self->one);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* An array of NumPy whose memory is then in `view`. */
static PyObject *new_array(EngineObject *self, PyObject *shape, PyObject *dtype, Py_buffer *view)
{
    PyObject *arguments[] = {shape, dtype};
    PyObject *array = PyObject_Vectorcall(self->empty, arguments, 2, NULL);
    if (array && PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *batch_shape(EngineObject *self, Py_ssize_t n)
{
    if (n == 1) {
        Py_INCREF(self->one);
        return self->one;
    }
    const Py_ssize_t ndim = PyTuple_GET_SIZE(self->output_shape);
    PyObject *shape = PyTuple_New(ndim + 1);
    PyObject *first = shape ? PyLong_FromSsize_t(n) : NULL;
    if (!first) {
        Py_XDECREF(shape);
        return NULL;
    }
    PyTuple_SET_ITEM(shape, 0, first);
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *item = PyTuple_GET_ITEM(self->output_shape, i);
        Py_INCREF(item);
        PyTuple_SET_ITEM(shape, i + 1, item);
    }
    return shape;
}

/* Whether the buffer is a batch of float32 or of input codes, in rows without gaps. */
static bool fits(const EngineObject *self, const Py_buffer *view, bool *real)
{
    const char *format = view->format ? view->format : "B";
    if (format[0] == 0 || format[1] != 0 || view->ndim != self->input_ndim + 1 || !view->shape[0])
        return false;
    *real = format[0] == 'f' && view->itemsize == 4;
    if (!*real && !(format[0] == self->code_format && view->itemsize == 1))
        return false;
    if (*real && (uintptr_t)view->buf % sizeof(float))
        return false;
    for (int i = 0; i < self->input_ndim; i++)
        if (view->shape[i + 1] != self->input_shape[i])
            return false;
    return true;
}

static PyObject *run_batch(EngineObject *self, PyObject *x, bool real_output, bool trace)
{
    Py_buffer input, output, traced = {0};
    bool real;
    if (PyObject_GetBuffer(x, &input, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) {
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            return NULL;
        PyErr_Clear(); /* no buffer, or one with gaps: not for this path */
        Py_RETURN_NONE;
    }
    if (!fits(self, &input, &real)) {
        PyBuffer_Release(&input);
        Py_RETURN_NONE;
    }
    const Py_ssize_t n = input.shape[0];
    PyObject *shape = batch_shape(self, n), *memory = NULL;
    PyObject *result = shape ? new_array(self, shape, real_output ? self->float_dtype
                                                                  : self->code_dtype, &output)
                             : NULL;
    Py_XDECREF(shape);
    if (result && trace) {
        const uint64_t bytes = self->engine->module->trace_bytes;
        shape = Py_BuildValue("(nK)", n, (unsigned long long)bytes);
        memory = shape ? new_array(self, shape, self->byte_dtype, &traced) : NULL;
        Py_XDECREF(shape);
        if (!memory) {
            PyBuffer_Release(&output);
            Py_CLEAR(result);
        }
    }
    if (!result) {
        PyBuffer_Release(&input);
        return NULL;
    }
    job j = {.engine = self->engine,
             .codes = real ? NULL : input.buf,
             .real = real ? input.buf : NULL,
             .out_codes = real_output ? NULL : output.buf,
             .out_real = real_output ? output.buf : NULL,
             .traced = trace ? traced.buf : NULL,
             .n = (size_t)n};
    int status;
    if (j.n * self->engine->sample_ns < KEEP_GIL_NS) {
        status = execute(&j);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = execute(&j);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&input);
    PyBuffer_Release(&output);
    if (memory)
        PyBuffer_Release(&traced);
    if (status != DONE) {
        Py_CLEAR(result);
        Py_XDECREF(memory);
        if (status == NO_MEMORY)
            return PyErr_NoMemory();
        Py_RETURN_NONE;
    }
    return memory ? Py_BuildValue("(NN)", result, memory) : result;
}

static PyObject *engine_codes(EngineObject *self, PyObject *x)
{
    return run_batch(self, x, false, false);
}

static PyObject *engine_run(EngineObject *self, PyObject *x)
{
    return run_batch(self, x, true, false);
}

static PyObject *engine_trace(EngineObject *self, PyObject *x)
{
    return run_batch(self, x, false, true);
}

static PyObject *get_arena_bytes(EngineObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->engine->module->arena_bytes);
}

static PyMethodDef engine_methods[] = {
    {"codes", (PyCFunction)engine_codes, METH_O, "A batch to output codes, or None."},
    {"run", (PyCFunction)engine_run, METH_O, "A batch to float32, or None."},
    {"trace", (PyCFunction)engine_trace, METH_O, "A batch to (codes, traced bytes), or None."},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef engine_attributes[] = {
    {"arena_bytes", (getter)get_arena_bytes, NULL, "Working memory of one thread.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot engine_slots[] = {{Py_tp_init, engine_init},
                                     {Py_tp_new, PyType_GenericNew},
                                     {Py_tp_dealloc, engine_dealloc},
                                     {Py_tp_methods, engine_methods},
                                     {Py_tp_getset, engine_attributes},
                                     {0, NULL}};

static PyType_Spec engine_type = {"intact_runtime.Engine", sizeof(EngineObject), 0,
                                  Py_TPFLAGS_DEFAULT, engine_slots};

static PyObject *python_features(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(intact_features());
}

static PyObject *python_cpu(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(intact_cpu());
}

static PyObject *python_request_amx(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromLong(intact_request_amx());
}

static PyObject *python_stop(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    Py_BEGIN_ALLOW_THREADS
    intact_stop();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"features", python_features, METH_NOARGS, "Features of CPU and operating system."},
    {"cpu", python_cpu, METH_NOARGS, "What distinguishes this model of CPU."},
    {"request_amx", python_request_amx, METH_NOARGS, "0 if this process may use AMX."},
    {"stop", python_stop, METH_NOARGS, "End the threads of the pool."},
    {NULL, NULL, 0, NULL}};

static int fill(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&engine_type);
    if (!type || PyModule_AddObject(module, "Engine", type)) {
        Py_XDECREF(type);
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill},
#if PY_VERSION_HEX >= 0x030d0000
                                          {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                          {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "intact_runtime", NULL, 0,
                                        functions, module_slots, NULL, NULL, NULL};

EXPORT PyObject *PyInit_intact_runtime(void)
{
    pthread_once(&set_up_once, set_up);
    return PyModuleDef_Init(&definition);
}

#endif
