/* Moves runs of bytes from files to memory, with threads that never enter the interpreter.
 *
 * Why it is here: copies that Python threads issue wait for each other (benchmarks/README.md, "The
 * engine"). The same is written in Python (python_engine.py), and tested against it. It knows nothing of
 * torch: addresses, file descriptors and the functions of the CUDA driver come in as numbers.
 *
 * A job is a grid of equal runs: run i of `rows` lies at offset + i * file_stride in the file and at
 * target + i * target_stride in memory. Jobs are cut into units of at most `chunk` bytes; small
 * neighbours share one. A thread takes the next unit and reads it with as few calls as can be (a gap
 * of at most `gap` bytes is read too, into a place that nobody looks at). No mapping is ever touched, so
 * that a file that shrinks is a short read and not a SIGBUS.
 *
 * Where the target is on a GPU, neighbouring units are a pack: they are read side by side into one slab
 * of page-locked memory, and leave it together, in as few copies as can be. One thread more starts all
 * copies: several that did so would wait for each other in the driver. The slab that is free last is the
 * first to be taken, and threads have their places in all: so it is in the caches of their cores.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MAX_SEGMENTS = 1024, BLOCK = 4096, NOT_READY = 600, NAP_NS = 10000, POPULATE_WRITE = 23 /* of madvise */ };
enum { FAILED_READ = 1, FILE_ENDED = 2, FAILED_CUDA = 3, NO_MEMORY = 4 };
#define MAX_CHUNK ((int64_t)1 << 29) /* with its gaps less than what one preadv reads */

typedef struct { int64_t file, offset, target, run, rows, file_stride, target_stride, direct; } job_t;
/* Bytes [begin, end) of one job's runs laid end to end, or all of the jobs `job` to `last`. For a GPU: its
 * pack, its place in the slab, and the file's offset at which a direct read began. */
typedef struct { int64_t job, last, begin, end, pack, place, first; } unit_t;
/* The units [begin, end), in one slab (-1: in none yet); `left` are not read yet, bit i of `untaken` is unit i. */
typedef struct { int64_t begin, end, slab, left; uint64_t untaken; } pack_t;
typedef struct { int64_t fd, direct_fd; /* -1: none */ } file_t;
/* Of the CUDA driver: each returns 0 where all is well. */
typedef struct {
    int (*set_context)(void *), (*copy)(uint64_t, const void *, size_t, void *), (*copy_2d)(const void *, void *);
    int (*event_create)(void **, unsigned), (*event_record)(void *, void *), (*event_query)(void *);
    int (*event_wait)(void *), (*event_destroy)(void *); void *context;
} cuda_t;

typedef struct { long long kind, code, job, offset, wanted, got; } fault_t;

typedef struct { /* what one thread works with */
    struct run *run;
    pthread_t id;
    char *gap, *bounce; struct iovec *iov;
    int64_t read, calls, read_ns, wait_ns; /* its own: threads that count in one place wait for each other */
} worker_t;

typedef struct run {
    PyObject *args; /* hold the memory of the tables */
    job_t *jobs; file_t *files; unit_t *units; pack_t *packs;
    int64_t num_jobs, num_units, chunk, gap, threads, buffer_bytes, num_streams;
    char *memory; /* page-locked: slabs, one after another */
    int64_t slab_bytes, num_slabs, num_free, num_packs, open; /* packs before `open` are taken wholly */
    int64_t until; /* units from this one on are not taken any more: it could not be read */
    int64_t *free, *full; /* slabs of which the last is taken next; packs that are read and not yet sent */
    void **events; /* one for each slab */
    int64_t *streams;
    cuda_t *cuda; /* NULL: targets are host memory */
    worker_t *workers; /* with a GPU the first one submits, the others read */
    int64_t started, readers;
    long long read, calls, read_ns, wait_ns; /* of threads that have ended */
    atomic_llong next, running, moved, num_full;
    atomic_int stop; /* & 1: nothing is sent any more; & 6: nor is any unit begun. The host's are begun in order */
    pthread_mutex_t lock;
    pthread_cond_t ended, freed, fed;
    fault_t fault;
} run_t;

static int64_t now_ns(void) {
    struct timespec t;
    return clock_gettime(CLOCK_MONOTONIC, &t), (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int fail(run_t *r, fault_t fault) {
    pthread_mutex_lock(&r->lock);
    fault_t *f = &r->fault;
    if (!f->kind || fault.job < f->job || (fault.job == f->job && fault.offset < f->offset))
        *f = fault;
    pthread_mutex_unlock(&r->lock);
    atomic_fetch_or(&r->stop, fault.kind == FAILED_CUDA || fault.kind == NO_MEMORY ? 3 : 1);
    return -1;
}

static int cuda_failed(run_t *r, int64_t job, int code) { return fail(r, (fault_t){FAILED_CUDA, code, job, 0, 0, 0}); }

/* Fills the segments, `wanted` bytes, from `offset` on; short reads go on where they ended. */
static int read_all(worker_t *w, int64_t job, int fd, struct iovec *iov, int count, int64_t offset, int64_t wanted) {
    run_t *r = w->run;
    int64_t done = 0;
    while (done < wanted) {
        ssize_t got = preadv(fd, iov, count, offset + done);
        w->calls++;
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            return fail(r, got ? (fault_t){FAILED_READ, errno, job, offset + done, wanted, done}
                               : (fault_t){FILE_ENDED, 0, job, offset, wanted, done});
        done += got, w->read += got;
        for (; count && (size_t)got >= iov->iov_len; iov++, count--)
            got -= (ssize_t)iov->iov_len;
        if (count)
            iov->iov_base = (char *)iov->iov_base + got, iov->iov_len -= (size_t)got;
    }
    return 0;
}

typedef struct { int64_t job, first, next; int fd, count; } batch_t; /* neighbours in the file, not yet read */

static int flush(worker_t *w, batch_t *b) {
    int bad = b->count ? read_all(w, b->job, b->fd, w->iov, b->count, b->first, b->next - b->first) : 0;
    b->count = 0;
    return bad;
}

static int add(worker_t *w, batch_t *b, int64_t job, int64_t offset, char *into, int64_t bytes) {
    run_t *r = w->run;
    int fd = (int)r->files[r->jobs[job].file].fd;
    int64_t gap = offset - b->next;
    if (b->count && (fd != b->fd || gap < 0 || gap > r->gap || b->count + 2 > MAX_SEGMENTS) && flush(w, b))
        return -1;
    if (!b->count)
        *b = (batch_t){job, offset, offset, fd, 0}, gap = 0;
    if (gap)
        w->iov[b->count++] = (struct iovec){w->gap, (size_t)gap};
    struct iovec *last = b->count ? &w->iov[b->count - 1] : NULL;
    if (last && !gap && (char *)last->iov_base + last->iov_len == into)
        last->iov_len += (size_t)bytes;
    else
        w->iov[b->count++] = (struct iovec){into, (size_t)bytes};
    b->next = offset + bytes;
    return 0;
}

/* Job k of a unit: its bytes [begin, end). */
static job_t *part_of(run_t *r, const unit_t *u, int64_t k, int64_t *begin, int64_t *end) {
    *begin = u->begin, *end = k > u->job ? r->jobs[k].run : u->end;
    return &r->jobs[k];
}

static int64_t bytes_of(run_t *r, const unit_t *u) {
    int64_t sum = u->end - u->begin;
    for (int64_t k = u->job + 1; k <= u->last; k++)
        sum += r->jobs[k].run;
    return sum;
}

/* The dense bytes of a job from byte `at` of its runs on, before `end`: where they are on either side. */
static int64_t piece_of(const job_t *j, int64_t at, int64_t end, int64_t *offset, char **target) {
    int64_t row = at / j->run, in = at % j->run, left = j->run - in;
    *offset = j->offset + row * j->file_stride + in;
    *target = (char *)(intptr_t)(j->target + row * j->target_stride + in);
    return left < end - at ? left : end - at;
}

/* The runs of a unit through the page cache: into the targets, or packed. */
static int read_usual(worker_t *w, unit_t *u, char *packed) {
    batch_t b = {0, 0, 0, -1, 0};
    for (int64_t k = u->job, begin, end, bytes, offset; k <= u->last; k++) {
        job_t *j = part_of(w->run, u, k, &begin, &end);
        for (char *into; begin < end; begin += bytes) {
            bytes = piece_of(j, begin, end, &offset, &into);
            if (add(w, &b, k, offset, packed ? packed : into, bytes)) return -1;
            packed = packed ? packed + bytes : NULL;
        }
    }
    return flush(w, &b);
}

static int64_t offset_of(const job_t *j, int64_t at) { return j->offset + at / j->run * j->file_stride + at % j->run; }

static int64_t blocks(int64_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

/* From the first block of a unit to its last byte. */
static int64_t span_of(run_t *r, const unit_t *u, int64_t *first) {
    int64_t begin, end;
    *first = offset_of(&r->jobs[u->job], u->begin) / BLOCK * BLOCK;
    job_t *j = part_of(r, u, u->last, &begin, &end);
    return offset_of(j, end - 1) + 1 - *first;
}

/* The whole span of a unit with O_DIRECT: offset, length and memory are multiples of BLOCK. Whatever
 * such a read cannot do, the usual one does, or says why not. */
static int read_direct(worker_t *w, unit_t *u, char *buffer, int64_t *first) {
    run_t *r = w->run;
    file_t *file = &r->files[r->jobs[u->job].file];
    int64_t needed = span_of(r, u, first);
    struct iovec one = {buffer, (size_t)blocks(needed)};
    if (file->direct_fd >= 0) {
        ssize_t got = preadv((int)file->direct_fd, &one, 1, *first);
        w->calls++;
        if (got >= needed) {
            w->read += got;
            return 0;
        }
    }
    one.iov_len = (size_t)needed;
    return read_all(w, u->job, (int)file->fd, &one, 1, *first, needed);
}

static void scatter(run_t *r, unit_t *u, const char *buffer, int64_t first) {
    for (int64_t k = u->job, begin, end, bytes, offset; k <= u->last; k++) {
        job_t *j = part_of(r, u, k, &begin, &end);
        for (char *into; begin < end; begin += bytes) {
            bytes = piece_of(j, begin, end, &offset, &into);
            memcpy(into, buffer + (offset - first), (size_t)bytes);
        }
    }
}

/* Takes a unit's memory from the system at once where it is new: a quarter cheaper than a fault for each
 * page in the midst of a read. The page in the middle tells: asking for what is there costs too. */
static void populate(const job_t *j, const unit_t *u) {
    int64_t offset;
    char *from, *last;
    unsigned char is_there = 1;
    piece_of(j, u->begin, u->end, &offset, &from), piece_of(j, u->end - 1, u->end, &offset, &last);
    from -= (uintptr_t)from % BLOCK, last += BLOCK - (uintptr_t)last % BLOCK;
    char *middle = from + (last - from) / 2 / BLOCK * BLOCK;
    if (last - from >= 16 * BLOCK && !mincore(middle, BLOCK, &is_there) && !(is_there & 1))
        madvise(from, (size_t)(last - from), POPULATE_WRITE); /* an older kernel refuses */
}

static int host_unit(worker_t *w, unit_t *u) {
    int64_t first;
    if (u->last == u->job) populate(&w->run->jobs[u->job], u);
    if (!w->run->jobs[u->job].direct) return read_usual(w, u, NULL);
    int bad = read_direct(w, u, w->bounce, &first);
    return bad ? bad : (scatter(w->run, u, w->bounce, first), 0);
}

/* Starts the copy of bytes [begin, end) of a job from `host`, whose rows are `pitch` bytes apart. */
static int launch(run_t *r, job_t *j, int64_t begin, int64_t end, char *host, int64_t pitch, void *stream) {
    int64_t row = begin / j->run, rows = (end - begin + j->run - 1) / j->run;
    uint64_t target = (uint64_t)(j->target + row * j->target_stride + begin % j->run);
    if (rows == 1 || (pitch == j->run && j->target_stride == j->run))
        return r->cuda->copy(target, host, (size_t)(end - begin), stream);
    /* CUDA_MEMCPY2D of cuda.h as words: of the source x, y, kind (1: host), host, device, array, pitch; of
     * the target the same (2: device); width, height. */
    uint64_t c[16] = {0, 0, 1, (uint64_t)(intptr_t)host, 0, 0, (uint64_t)pitch, 0, 0, 2, 0, target, 0,
                      (uint64_t)j->target_stride, (uint64_t)j->run, (uint64_t)rows};
    return r->cuda->copy_2d(c, stream);
}

/* The next unit for a thread: in the first two packs that have some left the one in its own place, so
 * that it mostly fills memory which is in its core's cache; else what slower ones have left in the first.
 * Before a unit that could not be read all are taken, so that the first fault is told. -1: none is left. */
static int64_t take(worker_t *w) {
    run_t *r = w->run;
    int64_t found = -1, me = (w - r->workers - 1) % 64, t = now_ns();
    pthread_mutex_lock(&r->lock);
    while (found < 0 && r->open < r->num_packs && !(atomic_load(&r->stop) & 6)) {
        pack_t *p = &r->packs[r->open], *next = p + 1; /* after the last there is one of no units */
        uint64_t mine = (uint64_t)1 << me;
        for (pack_t *one = p; one <= next; one++)
            if (one->untaken && one->slab < 0 && r->num_free)
                one->slab = r->free[--r->num_free];
        if (!p->untaken) {
            r->open++;
        } else if (p->slab < 0) {
            pthread_cond_wait(&r->freed, &r->lock);
        } else if (p->begin + __builtin_ctzll(p->untaken) >= r->until) {
            break;
        } else {
            p += !(p->untaken & mine) && next->slab >= 0 && next->untaken & mine && next->begin + me < r->until;
            int64_t bit = p->untaken & mine && p->begin + me < r->until ? me : __builtin_ctzll(p->untaken);
            p->untaken ^= (uint64_t)1 << bit, found = p->begin + bit;
        }
    }
    pthread_mutex_unlock(&r->lock);
    w->wait_ns += now_ns() - t;
    return found;
}

/* Reads a unit into the slab of its pack, and hands that on when it is full. */
static void cuda_unit(worker_t *w, int64_t at) {
    run_t *r = w->run;
    unit_t *u = &r->units[at];
    pack_t *p = &r->packs[u->pack];
    int64_t t = now_ns();
    char *into = r->memory + p->slab * r->slab_bytes + u->place;
    int bad = r->jobs[u->job].direct ? read_direct(w, u, into, &u->first) : read_usual(w, u, into);
    w->read_ns += now_ns() - t;
    pthread_mutex_lock(&r->lock);
    r->until = bad && at < r->until ? at : r->until;
    if (!--p->left) {
        r->full[r->num_full++] = u->pack;
        pthread_cond_signal(&r->fed);
    }
    pthread_mutex_unlock(&r->lock);
}

/* Whether a unit goes on where the one before it ends, on both sides: one copy. */
static int joins(run_t *r, const unit_t *before, const unit_t *u) {
    job_t *j = &r->jobs[u->job];
    return before->last == u->job && u->last == u->job && before->job == u->job && before->end == u->begin &&
           !j->direct && (j->rows == 1 || j->target_stride == j->run);
}

/* Starts the copies of a pack, whose units are read. Returns 0, or -1 after a failure. */
static int send_pack(run_t *r, pack_t *p, void *stream) {
    for (int64_t at = p->begin, next; at < p->end; at = next) {
        unit_t *u = &r->units[at];
        int64_t into = u->place, sum = bytes_of(r, u);
        for (next = at + 1; next < p->end && joins(r, &r->units[next - 1], &r->units[next]); next++)
            sum += bytes_of(r, &r->units[next]);
        for (int64_t k = u->job, begin, end, bad; k <= u->last; k++, into += end - begin) {
            job_t *j = part_of(r, u, k, &begin, &end);
            end = next > at + 1 ? begin + sum : end;
            char *host = r->memory + p->slab * r->slab_bytes;
            host += j->direct ? u->place + offset_of(j, begin) - u->first : into;
            if ((bad = launch(r, j, begin, end, host, j->direct ? j->file_stride : j->run, stream)))
                return cuda_failed(r, k, (int)bad);
        }
        atomic_fetch_add(&r->moved, sum);
    }
    return 0;
}

/* Packs to send into `packs`; waits for one unless copies are under way. -1: there will be none any more. */
static int64_t take_full(run_t *r, int64_t *packs, int64_t under_way) {
    if (under_way && !atomic_load(&r->num_full))
        return 0; /* not one lock for each look: the readers need it */
    pthread_mutex_lock(&r->lock);
    while (!r->num_full && r->readers && !under_way)
        pthread_cond_wait(&r->fed, &r->lock);
    int64_t n = atomic_exchange(&r->num_full, 0);
    memcpy(packs, r->full, sizeof(int64_t) * (size_t)n);
    int is_over = !n && !under_way && !r->readers;
    pthread_mutex_unlock(&r->lock);
    return is_over ? -1 : n;
}

static void give_back(run_t *r, int64_t slab) {
    pthread_mutex_lock(&r->lock);
    r->free[r->num_free++] = slab;
    pthread_cond_broadcast(&r->freed);
    pthread_mutex_unlock(&r->lock);
}

/* The submitting thread: sends packs as they are ready, and gives their slabs back when they have
 * arrived. After a fault it still waits for those: nothing
 * may be in flight in the end. */
static void submit(run_t *r) {
    int64_t n = r->num_slabs, begun = 0, ended = 0, count;
    int64_t *slabs = calloc((size_t)n * 2, sizeof(int64_t)), *packs = slabs + n; /* those on their way, in order */
    int code = slabs ? r->cuda->set_context(r->cuda->context) : 2;
    for (int64_t i = 0; i < n && !code; i++)
        code = r->cuda->event_create(&r->events[i], 2); /* without timing */
    if (code) cuda_failed(r, 0, code);
    while (slabs && (count = take_full(r, packs, begun - ended)) >= 0) {
        if (!count)
            nanosleep(&(struct timespec){0, NAP_NS}, NULL); /* its core is worth more to a reader */
        for (int64_t i = 0; i < count; i++) {
            pack_t *p = &r->packs[packs[i]];
            if (atomic_load(&r->stop)) {
                give_back(r, p->slab);
                continue;
            }
            void *stream = (void *)(intptr_t)r->streams[packs[i] % r->num_streams];
            send_pack(r, p, stream); /* after a failure some copies may be under way */
            if ((code = r->cuda->event_record(r->events[p->slab], stream)))
                cuda_failed(r, r->units[p->begin].job, code);
            slabs[begun++ % n] = p->slab;
        }
        for (; ended < begun; ended++) {
            code = r->cuda->event_query(r->events[slabs[ended % n]]);
            if (code == NOT_READY) break;
            if (code && !atomic_load(&r->stop)) cuda_failed(r, r->num_jobs, code);
            give_back(r, slabs[ended % n]);
        }
    }
    for (int64_t i = 0; i < n; i++)
        if (r->events[i]) r->cuda->event_destroy(r->events[i]);
    free(slabs);
}

static void read_units(worker_t *w) {
    run_t *r = w->run;
    w->iov = malloc(sizeof(struct iovec) * MAX_SEGMENTS), w->gap = malloc((size_t)r->gap + 1);
    if (!r->cuda && posix_memalign((void **)&w->bounce, BLOCK, (size_t)r->buffer_bytes))
        w->bounce = NULL;
    if (!w->iov || !w->gap || (!r->cuda && !w->bounce))
        fail(r, (fault_t){NO_MEMORY, ENOMEM, 0, 0, 0, 0});
    for (int64_t at; r->cuda && (at = take(w)) >= 0;)
        cuda_unit(w, at);
    for (int64_t at; !r->cuda && !atomic_load(&r->stop) && (at = atomic_fetch_add(&r->next, 1)) < r->num_units;)
        if (!host_unit(w, &r->units[at]))
            atomic_fetch_add(&r->moved, bytes_of(r, &r->units[at]));
    free(w->iov), free(w->gap), free(w->bounce);
}

static void *work(void *argument) {
    worker_t *w = argument;
    run_t *r = w->run;
    int submits = r->cuda && w == r->workers;
    submits ? submit(r) : read_units(w);
    pthread_mutex_lock(&r->lock);
    r->read += w->read, r->calls += w->calls, r->read_ns += w->read_ns, r->wait_ns += w->wait_ns;
    r->readers -= !submits;
    pthread_cond_broadcast(&r->fed), pthread_cond_broadcast(&r->freed);
    atomic_fetch_sub(&r->running, 1), pthread_cond_broadcast(&r->ended);
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* The most bytes of a unit: a direct read is widened to whole blocks, and has to fit a buffer too. */
static int64_t room_of(run_t *r, job_t *j) { return r->chunk - (j->direct && r->chunk >= 4 * BLOCK ? 2 * BLOCK : 0); }

/* Bytes of a job's runs that fit one unit: whole rows, or a piece of one long row. */
static int64_t unit_step(run_t *r, job_t *j) {
    int64_t row = j->direct && j->rows > 1 ? j->file_stride : j->run; /* direct reads take the gaps */
    int64_t most = room_of(r, j);
    if (j->rows == 1 || row > most) return most < j->run ? most : j->run;
    return most / row * j->run;
}

static int cut_units(run_t *r) {
    int64_t room = 0, n = 0;
    for (int64_t k = 0; k < r->num_jobs;) {
        job_t *j = &r->jobs[k];
        int64_t total = j->run * j->rows, last = k, step = total > 0 ? unit_step(r, j) : 0;
        if (total > 0 && j->rows == 1 && j->run < r->chunk / 2) { /* its small neighbours come along */
            int64_t stop = j->offset + j->run, sum = j->run;
            while (last + 1 < r->num_jobs && last + 1 - k < MAX_SEGMENTS / 2) {
                job_t *m = &r->jobs[last + 1];
                int64_t end = m->offset + m->run;
                if (m->rows != 1 || !m->run || m->file != j->file || m->direct != j->direct || m->offset < stop ||
                    m->offset - stop > r->gap || sum + m->run > room_of(r, j) || end - j->offset > room_of(r, j))
                    break;
                stop = end, sum += m->run, last++;
            }
        }
        for (int64_t at = 0; at < total;) {
            int64_t end = at + step, stop = step < j->run ? at - at % j->run + j->run : total; /* of a long row */
            end = end < stop ? end : stop;
            unit_t *more = n < room ? r->units : realloc(r->units, sizeof(unit_t) * (size_t)(room = room * 2 + 64));
            if (!more) return -1;
            r->units = more;
            r->units[n++] = (unit_t){k, last, at, end, 0, 0, 0};
            at = end;
        }
        k = last + 1;
    }
    r->num_units = n;
    return 0;
}

/* Units into packs: one for each thread, or as many neighbours as a slab holds. */
static int cut_packs(run_t *r) {
    int64_t n = 0, place = 0, first, most = r->threads < 64 ? r->threads : 64;
    r->packs = calloc((size_t)r->num_units + 2, sizeof(pack_t));
    for (int64_t at = 0; r->packs && at < r->num_units; at++) {
        unit_t *u = &r->units[at];
        int64_t room = r->jobs[u->job].direct ? blocks(span_of(r, u, &first)) : bytes_of(r, u);
        place = r->jobs[u->job].direct ? blocks(place) : place;
        if (!n || place + room > r->slab_bytes || r->packs[n - 1].left == most)
            r->packs[n++] = (pack_t){at, at, -1, 0, 0}, place = 0;
        pack_t *p = &r->packs[n - 1];
        p->untaken |= (uint64_t)1 << p->left++, p->end = at + 1;
        u->pack = n - 1, u->place = place, place += room;
    }
    r->num_packs = n, r->until = r->num_units;
    return !r->packs;
}

static void destroy(run_t *r) {
    for (int64_t i = 0; i < r->started; i++)
        pthread_join(r->workers[i].id, NULL);
    free(r->workers), free(r->units), free(r->packs), free(r->free), free(r->full), free(r->events);
    pthread_mutex_destroy(&r->lock), pthread_cond_destroy(&r->ended);
    pthread_cond_destroy(&r->freed), pthread_cond_destroy(&r->fed);
    free(r);
}

static void begin_threads(run_t *r) {
    int64_t count = r->threads + (r->cuda != NULL);
    sigset_t all, before;
    sigfillset(&all); /* signals are for the interpreter's own thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&r->lock);
    for (worker_t *w = r->workers; r->started < count; r->started++, w++)
        if ((w->run = r, pthread_create(&w->id, NULL, work, w))) break;
    int64_t readers = r->readers = r->started - (r->cuda && r->started); /* they begin, and may end, now */
    atomic_store(&r->running, r->started);
    pthread_mutex_unlock(&r->lock);
    if (!readers)
        fail(r, (fault_t){NO_MEMORY, EAGAIN, 0, 0, 0, 0});
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static run_t *run_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, "lading.run"); }
static void forget(PyObject *capsule) {
    run_t *r = run_of(capsule); /* which is one: the capsule is of this file */
    PyObject *args = r->args;
    atomic_fetch_or(&r->stop, 7);
    Py_BEGIN_ALLOW_THREADS
    destroy(r);
    Py_END_ALLOW_THREADS
    Py_DECREF(args);
}

static int prepare(run_t *r) {
    pthread_condattr_t by_clock;
    pthread_condattr_init(&by_clock), pthread_condattr_setclock(&by_clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL), pthread_cond_init(&r->ended, &by_clock), pthread_condattr_destroy(&by_clock);
    pthread_cond_init(&r->freed, NULL), pthread_cond_init(&r->fed, NULL);
    r->workers = calloc((size_t)r->threads + 1, sizeof(worker_t));
    size_t slabs = (size_t)r->num_slabs + 1;
    r->free = calloc(slabs, sizeof(int64_t)), r->full = calloc(slabs, sizeof(int64_t));
    r->events = calloc(slabs, sizeof(void *));
    for (int64_t i = r->num_slabs; r->free && i > 0; i--)
        r->free[r->num_free++] = i - 1;
    int bad = !r->workers || !r->free || !r->full || !r->events || cut_units(r) || (r->cuda && cut_packs(r));
    if (r->num_units < r->threads) r->threads = r->num_units ? r->num_units : 1;
    return bad;
}

static PyObject *start(PyObject *Py_UNUSED(self), PyObject *args) {
    const char *tables[5];
    Py_ssize_t sizes[5];
    long long threads, chunk, gap, buffer_bytes; /* of a slab, where there are any */
    if (!PyArg_ParseTuple(args, "y#y#y#y#y#LLLL", &tables[0], &sizes[0], &tables[1], &sizes[1], &tables[2], &sizes[2],
                          &tables[3], &sizes[3], &tables[4], &sizes[4], &threads, &chunk, &gap, &buffer_bytes))
        return NULL;
    run_t *r = calloc(1, sizeof(run_t));
    if (!r) return PyErr_NoMemory();
    r->jobs = (job_t *)tables[0], r->num_jobs = sizes[0] / (Py_ssize_t)sizeof(job_t);
    r->files = (file_t *)tables[1];
    const int64_t *slabs = sizes[2] == 2 * sizeof(int64_t) ? (const int64_t *)tables[2] : (int64_t[2]){0, 0};
    r->memory = (char *)(intptr_t)slabs[0], r->num_slabs = slabs[1], r->slab_bytes = buffer_bytes;
    r->streams = (int64_t *)tables[3], r->num_streams = sizes[3] / (Py_ssize_t)sizeof(int64_t);
    r->cuda = sizes[4] ? (cuda_t *)tables[4] : NULL;
    r->threads = threads, r->chunk = chunk, r->gap = gap, r->buffer_bytes = buffer_bytes;
    if (threads < 1 || chunk < BLOCK || chunk > MAX_CHUNK || gap < 0 || (sizes[4] && sizes[4] != sizeof(cuda_t)) ||
        (r->cuda ? r->num_slabs < 1 || r->num_streams < 1 || chunk < 4 * BLOCK || buffer_bytes < chunk
                 : buffer_bytes < chunk + 2 * BLOCK)) {
        free(r);
        PyErr_SetString(PyExc_ValueError, "threads, chunk, gap, slabs or streams are out of range");
        return NULL;
    }
    PyObject *capsule = prepare(r) ? PyErr_NoMemory() : PyCapsule_New(r, "lading.run", forget);
    if (!capsule) return destroy(r), NULL;
    Py_INCREF(r->args = args);
    begin_threads(r);
    return capsule;
}

static PyObject *wait_for(PyObject *Py_UNUSED(self), PyObject *args) {
    PyObject *capsule;
    double seconds;
    int over;
    run_t *r = PyArg_ParseTuple(args, "Od", &capsule, &seconds) ? run_of(capsule) : NULL;
    if (!r) return NULL;
    Py_BEGIN_ALLOW_THREADS
    int64_t ns = now_ns() + (int64_t)(seconds * 1e9);
    struct timespec until = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    pthread_mutex_lock(&r->lock);
    while (atomic_load(&r->running) > 0 && pthread_cond_timedwait(&r->ended, &r->lock, &until) != ETIMEDOUT)
        ;
    over = atomic_load(&r->running) <= 0;
    pthread_mutex_unlock(&r->lock);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("iL", over, (long long)atomic_load(&r->moved));
}

static PyObject *stop(PyObject *Py_UNUSED(self), PyObject *capsule) {
    run_t *r = run_of(capsule);
    return r ? atomic_fetch_or(&r->stop, 7), Py_BuildValue("") : NULL;
}

static PyObject *result(PyObject *Py_UNUSED(self), PyObject *capsule) {
    run_t *r = run_of(capsule);
    if (!r) return NULL;
    if (atomic_load(&r->running) > 0)
        return PyErr_SetString(PyExc_ValueError, "the run has not ended"), NULL;
    fault_t *f = &r->fault;
    return Py_BuildValue("(LLLLLL)(LLLLL)", f->kind, f->code, f->job, f->offset, f->wanted, f->got, r->read,
                         atomic_load(&r->moved), r->calls, r->read_ns, r->wait_ns);
}

static PyMethodDef methods[] = {{"start", start, METH_VARARGS, NULL}, {"wait", wait_for, METH_VARARGS, NULL},
                                {"stop", stop, METH_O, NULL}, {"result", result, METH_O, NULL}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_engine", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__engine(void) { return PyModule_Create(&module); }
