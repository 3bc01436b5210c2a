// Tiles of rows in shared memory, and products of tiles by a warp.
//
// A tile is rows of WIDTH elements: dims past the array's own are zeros. Rows lie PITCH elements apart, one piece more
// than they need, so that 8 rows of one column lie in 8 different groups of memory banks.
//
// A result tile of 16 rows and 8 columns lies in a warp's registers as `mma` wants it: thread 4 g + c holds row g at
// columns 2c and 2c + 1, then row g + 8 at the same. float32 is multiplied without matrix units, which would round it,
// but in the same places, so that all that follows is one code.
#pragma once
#include <instructions.cuh>

constexpr int WARP = 32;
constexpr int PITCH = WIDTH + PIECE;
constexpr int PIECES = WIDTH / PIECE;
constexpr int N_DIMS = WIDTH / 8;    // result tiles along the dims
constexpr int K_DIMS = WIDTH / 16;   // steps of a contraction over the dims

// One piece of a row: from a thread's own column of pieces on, `row` rows further; zeros where nothing is there.
// WHOLE: rows can be moved in pieces, and their stride in bytes fits 32 bits. Else the piece comes element by element, and
// without running ahead.
__device__ __forceinline__ void stage_piece(Element* to, const Element* column, const Array& of, int row, bool is_there) {
#if WHOLE
    // No address is looked at where nothing is there
    copy_async(to, row_at(column, row, int(of.token) * ELEMENT_BYTES), is_there);
#else
#pragma unroll
    for (int d = 0; d < PIECE; d++) to[d] = is_there ? column[row * of.token + d * of.dim] : to_element(0.f);
#endif
}

// Walks over the pieces of ROWS rows of a tile, each thread of THREADS over some: each(row, dim at which the piece begins).
template <int ROWS, int THREADS, class Each> __device__ __forceinline__ void for_pieces(u32 i_thread, Each each) {
    if (THREADS % PIECES == 0) {   // a thread stays in one column of pieces
        constexpr int ROW_STEP = THREADS / PIECES > 0 ? THREADS / PIECES : 1;
        const u32 first = i_thread / PIECES, o_dim = i_thread % PIECES * PIECE;
#pragma unroll
        for (u32 row = 0; row < ROWS; row += ROW_STEP)
            if (ROWS % ROW_STEP == 0 || first + row < ROWS) each(int(first + row), int(o_dim));
    } else {
#pragma unroll 4
        for (u32 i = i_thread; i < ROWS * PIECES; i += THREADS) each(int(i / PIECES), int(i % PIECES * PIECE));
    }
}

// Brings ROWS tokens of one head into a tile, each thread of THREADS some pieces; zeros where a token is -1.
template <int ROWS, int THREADS, class TokenOf>
__device__ __forceinline__ void stage(Element* tile, const Element* x, const Array& of, int dims, int i_thread,
                                      TokenOf token_of) {
    for_pieces<ROWS, THREADS>(i_thread, [&](int row, int o_dim) {
        const int token = token_of(row);
        stage_piece(tile + row * PITCH + o_dim, x + o_dim * of.dim, of, token, token >= 0 && o_dim < dims);
    });
}

// Lists come in runs: RUN tokens in a row, of which the first is a multiple of RUN. Blocks have at least so many.
constexpr int RUN = 8;

// A run of two arrays that are indexed alike: the head's data of each, and the first token; negative: none.
struct Run {
    const Element *x, *y;
    int first;
};

// Brings runs of x into a tile of ROWS rows and the same runs of y into the tile behind it, each thread of THREADS some
// pieces; zeros where no token is. run_of(i): of rows RUN i .. RUN i + 7.
//
// A thread that stays in one column of pieces asks for a run once, and goes from row to row by adding.
template <int ROWS, int THREADS, class RunOf>
__device__ __forceinline__ void stage_runs(Element* tile, const Array& x, const Array& y, int x_dims, int y_dims, int length,
                                           u32 i_thread, RunOf run_of) {
    if (WHOLE && THREADS % PIECES == 0) {
        constexpr int STEP = THREADS / PIECES > 0 ? THREADS / PIECES : 1;   // rows between a thread's pieces
        const int own = i_thread / PIECES, o_dim = i_thread % PIECES * PIECE;
        const int x_bytes = int(x.token) * ELEMENT_BYTES, y_bytes = int(y.token) * ELEMENT_BYTES;
        Element* to = tile + own * PITCH + o_dim;
        const Element *from_x, *from_y;
        int left = 0, left_x = 0, left_y = 0;   // rows of the run that are there, from the thread's first on
#pragma unroll
        for (int row = 0; row < ROWS; row += STEP) {
            if (ROWS % STEP && own + row >= ROWS) break;
            if (STEP >= RUN || row % RUN == 0) {
                const Run run = run_of(STEP < RUN ? row / RUN : (own + row) / RUN);
                const int token = run.first + (STEP < RUN ? own : (own + row) % RUN);
                left = run.first < 0 ? 0 : length - token;
                left_x = o_dim < x_dims ? left : 0;
                left_y = o_dim < y_dims ? left : 0;
                from_x = row_at(run.x + o_dim, token, x_bytes);
                from_y = row_at(run.y + o_dim, token, y_bytes);
            } else {
                from_x = row_at(from_x, STEP, x_bytes);
                from_y = row_at(from_y, STEP, y_bytes);
            }
            const int past = STEP < RUN ? row % RUN : 0;
            copy_async(to + row * PITCH, from_x, past < left_x);   // no address is looked at where nothing is there
            copy_async(to + (ROWS + row) * PITCH, from_y, past < left_y);
        }
    } else {
        for_pieces<ROWS, THREADS>(i_thread, [&](int row, int o_dim) {
            const Run run = run_of(row / RUN);
            const int token = run.first + row % RUN;
            const bool is_there = run.first >= 0 && token < length;
            Element* to = tile + row * PITCH + o_dim;
            stage_piece(to, run.x + o_dim * x.dim, x, token, is_there && o_dim < x_dims);
            stage_piece(to + ROWS * PITCH, run.y + o_dim * y.dim, y, token, is_there && o_dim < y_dims);
        });
    }
}

// What a warp holds of 16 rows as the left side of products over the dims: registers where they are few, else the tile.
#if ELEMENT_BYTES == 2
constexpr bool ROWS_IN_REGISTERS = WIDTH <= MOST_ROW_REGISTERS;

struct Rows {
    u32 a[ROWS_IN_REGISTERS ? K_DIMS : 1][4];
    const Element* tile;
};

// Where lane i points for ldmatrix: at 16 rows of a left side, or of a right side whose rows are contracted; and at 16
// rows of a right side whose dims are contracted.
__device__ __forceinline__ int left_offset(int lane) { return (lane % 16) * PITCH + lane / 16 * 8; }
__device__ __forceinline__ int right_offset(int lane) { return (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8; }

__device__ __forceinline__ void hold(Rows& rows, const Element* tile, int lane) {
    rows.tile = tile;
    if (ROWS_IN_REGISTERS) {
#pragma unroll
        for (int k = 0; k < K_DIMS; k++) ldmatrix(rows.a[ROWS_IN_REGISTERS ? k : 0], tile + left_offset(lane) + k * 16);
    }
}

// s[16, 8 N] += rows x^T for 8 N rows of a tile x; sums over the dims.
template <int N>
__device__ __forceinline__ void add_scores(float (&s)[N][4], const Rows& rows, const Element* x, int lane) {
#pragma unroll
    for (int k = 0; k < K_DIMS; k++) {
        u32 a[4];
        if (ROWS_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = rows.a[ROWS_IN_REGISTERS ? k : 0][i];
        } else {
            ldmatrix(a, rows.tile + left_offset(lane) + k * 16);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, x + n * 8 * PITCH + right_offset(lane) + k * 16);
            mma(s[n], a, b[0], b[1]);
            mma(s[n + 1], a, b[2], b[3]);
        }
    }
}

// o[16, WIDTH] += p x for 8 N rows of a tile x; p is rounded to elements; sums over the rows.
template <int N>
__device__ __forceinline__ void add_rows(float (&o)[N_DIMS][4], const float (&p)[N][4], const Element* x, int lane) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        const u32 a[4] = {pack(p[n][0], p[n][1]), pack(p[n][2], p[n][3]), pack(p[n + 1][0], p[n + 1][1]),
                          pack(p[n + 1][2], p[n + 1][3])};
#pragma unroll
        for (int d = 0; d < N_DIMS; d += 2) {
            u32 b[4];
            ldmatrix_transposed(b, x + n * 8 * PITCH + left_offset(lane) + d * 8);
            mma(o[d], a, b[0], b[1]);
            mma(o[d + 1], a, b[2], b[3]);
        }
    }
}
#else
constexpr bool ROWS_IN_REGISTERS = false;

struct Rows {
    const Element* tile;
};

__device__ __forceinline__ void hold(Rows& rows, const Element* tile, int) { rows.tile = tile; }

__device__ __forceinline__ void add_dot(float& s, const float4& a, const float4& b) {
    s += a.x * b.x;
    s += a.y * b.y;
    s += a.z * b.z;
    s += a.w * b.w;
}

template <int N>
__device__ __forceinline__ void add_scores(float (&s)[N][4], const Rows& rows, const Element* x, int lane) {
    const Element *upper = rows.tile + lane / 4 * PITCH, *lower = upper + 8 * PITCH, *column = x + lane % 4 * 2 * PITCH;
#pragma unroll 2
    for (int d = 0; d < WIDTH; d += 4) {
        const float4 a0 = *reinterpret_cast<const float4*>(upper + d), a1 = *reinterpret_cast<const float4*>(lower + d);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float4 b0 = *reinterpret_cast<const float4*>(column + n * 8 * PITCH + d);
            const float4 b1 = *reinterpret_cast<const float4*>(column + (n * 8 + 1) * PITCH + d);
            add_dot(s[n][0], a0, b0);
            add_dot(s[n][1], a0, b1);
            add_dot(s[n][2], a1, b0);
            add_dot(s[n][3], a1, b1);
        }
    }
}

// The tile's sum is made by itself and then added, so that rounding grows with the number of tiles and not of rows.
template <int N>
__device__ __forceinline__ void add_rows(float (&o)[N_DIMS][4], const float (&p)[N][4], const Element* x, int lane) {
    float upper[8 * N], lower[8 * N];  // all p of the thread's two rows: row j's are held by thread j % 8 / 2 of each four
#pragma unroll
    for (int j = 0; j < 8 * N; j++) {
        upper[j] = __shfl_sync(~0u, p[j / 8][j % 2], (lane & ~3) + j % 8 / 2);
        lower[j] = __shfl_sync(~0u, p[j / 8][2 + j % 2], (lane & ~3) + j % 8 / 2);
    }
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) {
        float part[4] = {};
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            const float2 b = *reinterpret_cast<const float2*>(x + j * PITCH + d * 8 + lane % 4 * 2);
            part[0] += upper[j] * b.x;
            part[1] += upper[j] * b.y;
            part[2] += lower[j] * b.x;
            part[3] += lower[j] * b.y;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) o[d][i] += part[i];
    }
}
#endif

// Writes 16 rows of results, times a factor for each half of the rows, to the rows of an array from `first` on, by way of
// a tile in shared memory that is the warp's own, so that a row goes out in whole pieces.
__device__ __forceinline__ void write_rows(const float (&o)[N_DIMS][4], float upper, float lower, Element* tile, Element* x,
                                           const Array& of, int rows, int dims, int lane) {
    const int g = lane / 4, c = lane % 4;
    __syncwarp();
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) {
        Element* to = tile + g * PITCH + d * 8 + 2 * c;
        to[0] = to_element(o[d][0] * upper);
        to[1] = to_element(o[d][1] * upper);
        to[8 * PITCH] = to_element(o[d][2] * lower);
        to[8 * PITCH + 1] = to_element(o[d][3] * lower);
    }
    __syncwarp();
    for_pieces<16, WARP>(lane, [&](int row, int o_dim) {
        if (row < rows && o_dim < dims) {
            const Element* from = tile + row * PITCH + o_dim;
            Element* to = x + row * of.token + o_dim * of.dim;
#if WHOLE
            *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
#else
            for (int d = 0; d < PIECE; d++) to[d * of.dim] = from[d];
#endif
        }
    });
    __syncwarp();
}
