/* Fused selective scan for CPUs: value and gradient, float32.
 *
 * The maths is that of mamba-ssm's selective_scan_ref (Gu and Dao 2023, algorithm 2), per batch b, channel d, state n:
 *
 *     dt  = softplus(delta + bias)                     (or delta + bias)
 *     h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t         h_{-1} = 0
 *     y_t = (sum_n C_t h_t + D u_t) silu(z_t)          (D and z may be absent)
 *
 * How it is laid out:
 *   - One SIMD lane is one channel, so the scan itself needs no shuffles and no sums across lanes.
 *   - A task is one batch element and a group of at most GROUP blocks of W channels. Tasks share nothing that they
 *     write: sums over tasks (dA, dD, dbias over b; dB, dC over groups) leave as partials that the caller adds in fixed
 *     order. Results therefore depend on neither the number of threads nor on their timing.
 *   - No (B, L, D, N) array exists. The backward pass keeps h at the start of every CHUNK steps, then walks the chunks
 *     from the last to the first and computes the states inside one again; a chunk's working set stays in L1.
 *
 * Explicit vectors and not -ffast-math: NaN and infinity must come out as they do in torch, rounding by a magic
 * constant must not be simplified away, and gcc links a start-up file with -ffast-math that turns denormals off in
 * the whole process.
 */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

#define CHUNK 8
#define GROUP 4

/* Mirrored field by field in cpu.py. All arrays are contiguous; D, z and bias may be null, and dz, dbias with them. */
struct scan {
    int64_t batch, channels, length, state, softplus, threads;
    int64_t from_end; /* the recurrence begins at the last step; arrays lie in the order of time all the same */
    int64_t add;      /* to what the outputs hold already, dA excepted: a second direction behind the first one */
    int64_t by_token; /* each (b,d,l) below lies as (b,l,d), and each (b,n,l) as (b,l,n) */
    const float *u, *delta, *A, *B, *C, *D, *z, *bias; /* (b,d,l) (b,d,l) (d,n) (b,n,l) (b,n,l) (d) (b,d,l) (d) */
    float *scratch;                                    /* threads x aum_scan_scratch() floats, 64-byte aligned */
    float *y;                                          /* forward: (b,d,l) */
    const float *grad_y;                               /* backward, all below: (b,d,l) */
    float *du, *ddelta, *dz;                           /* (b,d,l) */
    float *dA, *dB, *dC, *dD, *dbias;                  /* (b,d,n) (group,b,n,l) (group,b,n,l) (b,d) (b,d) */
};

/* ---- tasks ------------------------------------------------------------------------------------------------------- */

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t n_blocks(int64_t channels) { return (channels + W - 1) / W; }
static int64_t n_chunks(int64_t length) { return (length + CHUNK - 1) / CHUNK; }
static int64_t padded(int64_t floats) { return (floats + 15) & ~15; }

/* Groups of channel blocks: the first dimension of the partial dB and dC. */
int64_t aum_scan_groups(int64_t channels) { return (n_blocks(channels) + GROUP - 1) / GROUP; }

/* Floats of scratch that one thread needs; a whole number of vectors, so that every thread's part is aligned. */
int64_t aum_scan_scratch(int64_t length, int64_t state, int64_t backward) {
    int64_t vectors = backward ? 3 * GROUP + n_chunks(length) * GROUP + 4 * CHUNK + 1 : 2;
    return vectors * state * W + 2 * padded(length * state);
}

/* Which batch element and channels a task has, its B and C turned to (l,n), and the scratch behind them. */
struct task {
    int64_t batch, group, first_block, blocks;
    float *B, *C;
    vec *free_vectors;
};

static struct task begin_task(const struct scan *s, int64_t index, float *scratch) {
    int64_t groups = aum_scan_groups(s->channels), L = s->length, N = s->state;
    int64_t per_group = (n_blocks(s->channels) + groups - 1) / groups;
    struct task k = {.batch = index / groups, .group = index % groups};
    k.first_block = k.group * per_group;
    k.blocks = min64(per_group, n_blocks(s->channels) - k.first_block);
    k.B = scratch;
    k.C = k.B + padded(L * N);
    k.free_vectors = (vec *)(k.C + padded(L * N));
    if (s->by_token) {
        memcpy(k.B, s->B + k.batch * N * L, N * L * sizeof(float));
        memcpy(k.C, s->C + k.batch * N * L, N * L * sizeof(float));
    } else {
        transpose(s->B + k.batch * N * L, L, N, L, k.B, N);
        transpose(s->C + k.batch * N * L, L, N, L, k.C, N);
    }
    if (s->from_end) {
        turn_rows(k.B, L, N);
        turn_rows(k.C, L, N);
    }
    return k;
}

/* Where `steps` steps of the recurrence, the first of them `start`, begin in time. */
INLINE int64_t place_of(const struct scan *s, int64_t start, int64_t steps) {
    return s->from_end ? s->length - start - steps : start;
}

/* Where channel d of a batch element begins at this place in time. */
INLINE int64_t offset_of(const struct scan *s, int64_t batch, int64_t d, int64_t place) {
    return s->by_token ? (batch * s->length + place) * s->channels + d : (batch * s->channels + d) * s->length + place;
}

/* What lies in memory to vectors in the order of the recurrence, and back. */
INLINE void read_rows(const struct scan *s, const float *from, int64_t lanes, int64_t steps, vec *to) {
    if (s->by_token)
        load_columns(from, s->channels, lanes, steps, to);
    else
        load_rows(from, s->length, lanes, steps, to);
    if (s->from_end)
        turn(to, steps);
}

INLINE void write_rows(const struct scan *s, vec *from, int64_t lanes, int64_t steps, float *to) {
    vec held[CHUNK];
    if (s->add) {
        read_rows(s, to, lanes, steps, held);
        for (int64_t t = 0; t < steps; t++)
            from[t] = held[t] + from[t];
    }
    if (s->from_end)
        turn(from, steps);
    if (s->by_token)
        store_columns(from, s->channels, lanes, steps, to);
    else
        store_rows(from, s->length, lanes, steps, to);
}

/* Sums over lanes, sums[t * state + n], to (n,l), or by token (l,n), from this place in time on. */
static void write_lane_sums(const struct scan *s, const vec *sums, int64_t place_of_first, int64_t steps, float *to) {
    int64_t of_state = s->by_token ? 1 : s->length, of_step = s->by_token ? s->state : 1;
    for (int64_t t = 0; t < steps; t++)
        for (int64_t n = 0; n < s->state; n++) {
            int64_t time = place_of_first + (s->from_end ? steps - 1 - t : t);
            float *place = to + n * of_state + time * of_step;
            float sum = lane_sum(&sums[t * s->state + n]);
            *place = s->add ? *place + sum : sum;
        }
}

INLINE void write_lanes(const struct scan *s, vec v, int64_t lanes, float *to) {
    if (s->add)
        v += load_lanes(to, 1, lanes);
    store_lanes(v, 1, lanes, to);
}

INLINE int64_t first_channel(const struct task *k, int64_t block) { return (k->first_block + block) * W; }
INLINE int64_t lanes_of(const struct scan *s, const struct task *k, int64_t block) {
    return min64(W, s->channels - first_channel(k, block));
}

/* A * log2(e) of a block, so that exp(dt A) is one exp2. */
static void load_A(const struct scan *s, const struct task *k, int64_t block, vec *A2) {
    const float *A = s->A + first_channel(k, block) * s->state;
    for (int64_t n = 0; n < s->state; n++)
        A2[n] = load_lanes(A + n, s->state, lanes_of(s, k, block)) * LOG2_E;
}

INLINE vec optional_lanes(const float *values, int64_t channel, int64_t lanes) {
    return values ? load_lanes(values + channel, 1, lanes) : splat(0.0f);
}

/* What one chunk of one block starts from: u, dt, dt * u and d dt / d delta. */
struct steps {
    vec u[CHUNK], dt[CHUNK], x[CHUNK], slope[CHUNK];
};

INLINE void load_steps(const struct scan *s, int64_t offset, int64_t lanes, int64_t steps, vec bias, int want_slope,
                       struct steps *c) {
    read_rows(s, s->u + offset, lanes, steps, c->u);
    read_rows(s, s->delta + offset, lanes, steps, c->dt);
    for (int64_t t = 0; t < steps; t++) {
        vec raw = c->dt[t] + bias;
        if (want_slope)
            c->slope[t] = s->softplus ? sigmoid_vec(raw) : splat(1.0f);
        c->dt[t] = s->softplus ? softplus_vec(raw) : raw;
        c->x[t] = c->dt[t] * c->u[t];
    }
}

/* The recurrence over one chunk. h holds N vectors and is overwritten; with `decay` given, h holds (steps + 1) x N, the
 * first N filled, and every state and decay factor is kept. y, when given, receives sum_n C h. */
INLINE void advance(int64_t N, int64_t steps, const vec *A2, const float *B, const float *C, const struct steps *c,
                    vec *h, vec *decay, vec *y) {
    for (int64_t t = 0; t < steps; t++) {
        const vec dt = c->dt[t], x = c->x[t];
        vec read = {0}, *next = decay ? h + N : h;
        for (int64_t n = 0; n < N; n++) {
            vec a = exp2_vec(dt * A2[n]);
            vec state = a * h[n] + x * B[t * N + n];
            next[n] = state;
            if (decay)
                decay[t * N + n] = a;
            if (y)
                read += state * C[t * N + n];
        }
        if (y)
            y[t] = read;
        h = next;
    }
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static void forward_task(const struct scan *s, int64_t index, float *scratch) {
    const int64_t L = s->length, N = s->state;
    struct task k = begin_task(s, index, scratch);
    vec *A2 = k.free_vectors, *h = A2 + N;
    struct steps c;
    vec y[CHUNK], z[CHUNK];
    for (int64_t block = 0; block < k.blocks; block++) {
        int64_t d = first_channel(&k, block), lanes = lanes_of(s, &k, block);
        vec skip = optional_lanes(s->D, d, lanes), bias = optional_lanes(s->bias, d, lanes);
        load_A(s, &k, block, A2);
        memset(h, 0, N * sizeof(vec));
        for (int64_t start = 0; start < L; start += CHUNK) {
            int64_t steps = min64(CHUNK, L - start);
            int64_t offset = offset_of(s, k.batch, d, place_of(s, start, steps));
            load_steps(s, offset, lanes, steps, bias, 0, &c);
            advance(N, steps, A2, k.B + start * N, k.C + start * N, &c, h, 0, y);
            if (s->D)
                for (int64_t t = 0; t < steps; t++)
                    y[t] += skip * c.u[t];
            if (s->z) {
                read_rows(s, s->z + offset, lanes, steps, z);
                for (int64_t t = 0; t < steps; t++)
                    y[t] *= z[t] * sigmoid_vec(z[t]);
            }
            write_rows(s, y, lanes, steps, s->y + offset);
        }
    }
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

/* Everything of a block that lives as long as its task; N vectors behind each pointer. */
struct block {
    vec *A2, *carry, *dA;
    vec skip, bias, dskip, dbias;
};

/* The adjoint of one chunk, last step first. h and decay are what `advance` kept, g the gradient at sum_n C h + D u.
 * Adds to dB_sum, dC_sum and to the block's dA; gives the gradients at x = dt * u and, by the decay alone, at dt. */
INLINE void retreat(int64_t N, int64_t steps, struct block *b, const float *B, const float *C, const struct steps *c,
                    const vec *h, const vec *decay, const vec *g, vec *dB_sum, vec *dC_sum, vec *dx, vec *ddt) {
    const vec *A2 = b->A2;
    vec *carry = b->carry, *dA = b->dA;
    for (int64_t t = steps - 1; t >= 0; t--) {
        const vec dt = c->dt[t], x = c->x[t], gt = g[t];
        vec to_x = {0}, to_dt = {0};
        for (int64_t n = 0; n < N; n++) {
            int64_t i = t * N + n;
            vec dh = carry[n] + gt * C[i];
            dC_sum[i] += gt * h[i + N];
            dB_sum[i] += dh * x;
            to_x += dh * B[i];
            vec to_previous = dh * decay[i];
            carry[n] = to_previous;
            vec at_exponent = to_previous * h[i];
            dA[n] += at_exponent * dt;
            to_dt += at_exponent * A2[n];
        }
        dx[t] = to_x;
        ddt[t] = to_dt * LN_2;
    }
}

static void backward_task(const struct scan *s, int64_t index, float *scratch) {
    const int64_t L = s->length, N = s->state, chunks = n_chunks(L);
    struct task k = begin_task(s, index, scratch);
    vec *free_vectors = k.free_vectors;
    struct block blocks[GROUP];
    for (int64_t i = 0; i < k.blocks; i++) {
        int64_t d = first_channel(&k, i), lanes = lanes_of(s, &k, i);
        blocks[i] = (struct block){.A2 = free_vectors, .carry = free_vectors + N, .dA = free_vectors + 2 * N,
                                   .skip = optional_lanes(s->D, d, lanes), .bias = optional_lanes(s->bias, d, lanes)};
        free_vectors += 3 * N;
        load_A(s, &k, i, blocks[i].A2);
        memset(blocks[i].carry, 0, 2 * N * sizeof(vec)); /* and dA, which lies behind it */
    }
    vec *h = free_vectors, *decay = h + (CHUNK + 1) * N, *dB_sum = decay + CHUNK * N, *dC_sum = dB_sum + CHUNK * N;
    vec *saved = dC_sum + CHUNK * N; /* (chunks, blocks, N): h before each chunk */
    struct steps c;

    for (int64_t i = 0; i < k.blocks; i++) {
        int64_t lanes = lanes_of(s, &k, i), d = first_channel(&k, i);
        memset(h, 0, N * sizeof(vec));
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t start = chunk * CHUNK, steps = min64(CHUNK, L - start);
            memcpy(saved + (chunk * k.blocks + i) * N, h, N * sizeof(vec));
            int64_t offset = offset_of(s, k.batch, d, place_of(s, start, steps));
            load_steps(s, offset, lanes, steps, blocks[i].bias, 0, &c);
            advance(N, steps, blocks[i].A2, k.B + start * N, 0, &c, h, 0, 0);
        }
    }

    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        int64_t start = chunk * CHUNK, steps = min64(CHUNK, L - start), place = place_of(s, start, steps);
        const float *B = k.B + start * N, *C = k.C + start * N;
        vec g[CHUNK], y[CHUNK], z[CHUNK], dx[CHUNK], ddt[CHUNK];
        memset(dB_sum, 0, 2 * CHUNK * N * sizeof(vec)); /* and dC_sum */
        for (int64_t i = 0; i < k.blocks; i++) {
            struct block *b = &blocks[i];
            int64_t lanes = lanes_of(s, &k, i), offset = offset_of(s, k.batch, first_channel(&k, i), place);
            load_steps(s, offset, lanes, steps, b->bias, 1, &c);
            read_rows(s, s->grad_y + offset, lanes, steps, g);
            memcpy(h, saved + (chunk * k.blocks + i) * N, N * sizeof(vec));
            if (s->z) {
                read_rows(s, s->z + offset, lanes, steps, z);
                advance(N, steps, b->A2, B, C, &c, h, decay, y);
                for (int64_t t = 0; t < steps; t++) {
                    vec gate = sigmoid_vec(z[t]), into = g[t];
                    g[t] = into * z[t] * gate;
                    z[t] = into * (y[t] + b->skip * c.u[t]) * gate * (1.0f + z[t] * (1.0f - gate)); /* now dz */
                }
                write_rows(s, z, lanes, steps, s->dz + offset);
            } else {
                advance(N, steps, b->A2, B, 0, &c, h, decay, 0);
            }
            retreat(N, steps, b, B, C, &c, h, decay, g, dB_sum, dC_sum, dx, ddt);
            for (int64_t t = 0; t < steps; t++) {
                vec ddelta = (ddt[t] + dx[t] * c.u[t]) * c.slope[t];
                b->dskip += g[t] * c.u[t];
                b->dbias += ddelta;
                dx[t] = dx[t] * c.dt[t] + g[t] * b->skip; /* now du */
                ddt[t] = ddelta;
            }
            write_rows(s, dx, lanes, steps, s->du + offset);
            write_rows(s, ddt, lanes, steps, s->ddelta + offset);
        }
        int64_t sums = (k.group * s->batch + k.batch) * N * L;
        write_lane_sums(s, dB_sum, place, steps, s->dB + sums);
        write_lane_sums(s, dC_sum, place, steps, s->dC + sums);
    }

    for (int64_t i = 0; i < k.blocks; i++) {
        int64_t lanes = lanes_of(s, &k, i), d = k.batch * s->channels + first_channel(&k, i);
        for (int64_t n = 0; n < N; n++)
            store_lanes(blocks[i].dA[n], N, lanes, s->dA + d * N + n);
        if (s->D)
            write_lanes(s, blocks[i].dskip, lanes, s->dD + d);
        if (s->bias)
            write_lanes(s, blocks[i].dbias, lanes, s->dbias + d);
    }
}

/* ---- entry points ------------------------------------------------------------------------------------------------ */

static void run(const struct scan *s, void (*task)(const struct scan *, int64_t, float *), int64_t backward) {
    int64_t tasks = s->batch * aum_scan_groups(s->channels);
    int64_t stride = aum_scan_scratch(s->length, s->state, backward);
    /* dynamic: a thread that the system holds up delays one task, not its whole share */
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (int64_t i = 0; i < tasks; i++) {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        task(s, i, s->scratch + thread * stride);
    }
}

void aum_scan_forward(const struct scan *s) { run(s, forward_task, 0); }
void aum_scan_backward(const struct scan *s) { run(s, backward_task, 1); }
