// Products of matrices (T: double or float) with a few hundred columns at most, or batches of small ones.
//
// One row times one column is one sum, in the order of the inner index, whatever the sizes and the number of
// threads. Blocks of rows x vectors of sums stay in registers (Goto and van de Geijn, ACM TOMS 34, 12, 2008);
// the right factor is packed into panels as wide as such a block, filled up with zeros.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace mtinfer {

// Keep a vector in a register: the compiler would rather load it anew for each use, and loads are the bottleneck.
template <class Vector>
inline void keep(Vector& x) {
#if defined(__GNUC__) && defined(CPU_CAPABILITY_AVX512)
    using Register = std::conditional_t<std::is_same_v<Vector, at::vec::Vectorized<float>>, __m512, __m512d>;
    asm("" : "+v"(reinterpret_cast<Register&>(x)));
#elif defined(__GNUC__) && defined(CPU_CAPABILITY_AVX2)
    using Register = std::conditional_t<std::is_same_v<Vector, at::vec::Vectorized<float>>, __m256, __m256d>;
    asm("" : "+x"(reinterpret_cast<Register&>(x)));
#endif
}

// Copy less than a vector of numbers, and zeros behind them where `fill` (calls of memcpy would cost more).
template <bool fill = true, class T>
inline void copy_few(const T* in, T* out, int64_t n) {
    for (int64_t i = 0; i < at::vec::Vectorized<T>::size(); ++i) {
        if (i < n) out[i] = in[i];
        else if (fill) out[i] = T(0);
    }
}

template <class T>
struct Product {
    using Vector = at::vec::Vectorized<T>;
    static constexpr int64_t lanes = Vector::size();
    static constexpr int64_t max_width = 3;                   // of a panel, in vectors
    static constexpr int64_t n_sums = sizeof(Vector) >= 64 ? 24 : 12;  // registers for sums
    static constexpr double min_parallel = 1e5;              // multiplications worth more than one thread
    static constexpr int64_t long_inner = 256;               // inner axis of a part of a long one
    static constexpr int64_t max_sums = 1 << 20;             // of all parts, but for a single one

    int64_t n_rows, n_columns, n_inner;
    int64_t row_stride, inner_stride;              // of the left factor
    int64_t right_inner_stride, right_column_stride;

    int64_t n_vectors() const { return (n_columns + lanes - 1) / lanes; }
    int64_t n_panels() const { return (n_vectors() + max_width - 1) / max_width; }
    int64_t panel_begin(int64_t panel) const { return n_vectors() * panel / n_panels(); }
    int64_t packed_size() const { return n_vectors() * lanes * n_inner; }

    void pack(const T* right, T* packed, int64_t panel) const {
        const int64_t begin = panel_begin(panel) * lanes, width = panel_begin(panel + 1) * lanes - begin;
        const int64_t used = std::min(width, n_columns - begin), whole = used - used % lanes;
        T* out = packed + begin * n_inner;
        const T* in = right + begin * right_column_stride;
        if (right_column_stride == 1) {
            for (int64_t k = 0; k < n_inner; ++k, in += right_inner_stride, out += width) {
                for (int64_t n = 0; n < whole; n += lanes) Vector::loadu(in + n).store(out + n);
                if (whole < width) copy_few(in + whole, out + whole, used - whole);
            }
        } else {
            for (int64_t n = 0; n < width; ++n)
                for (int64_t k = 0; k < n_inner; ++k)
                    out[k * width + n] = n < used ? in[n * right_column_stride + k * right_inner_stride] : T(0);
        }
    }

    template <int64_t rows, int64_t width>
    void block(const T* left, const T* packed, T* result, int64_t result_stride) const {
        Vector sums[rows][width];
        for (auto& row : sums)
            for (auto& sum : row) sum = Vector(T(0));
        for (int64_t k = 0; k < n_inner; ++k, left += inner_stride, packed += width * lanes) {
            Vector right[width];
#pragma GCC unroll 3
            for (int64_t v = 0; v < width; ++v) {
                right[v] = Vector::loadu(packed + v * lanes);
                keep(right[v]);
            }
#pragma GCC unroll 8
            for (int64_t m = 0; m < rows; ++m) {
                const Vector x(left[m * row_stride]);
#pragma GCC unroll 3
                for (int64_t v = 0; v < width; ++v) sums[m][v] = at::vec::fmadd(x, right[v], sums[m][v]);
            }
        }
#pragma GCC unroll 8
        for (int64_t m = 0; m < rows; ++m)
#pragma GCC unroll 3
            for (int64_t v = 0; v < width; ++v) sums[m][v].store(result + m * result_stride + v * lanes);
    }

    template <int64_t rows, int64_t width>
    void part(const T* left, const T* packed, T* result, int64_t used) const {
        if (used >= width * lanes) return block<rows, width>(left, packed, result, n_columns);
        alignas(64) T whole[rows * width * lanes];
        block<rows, width>(left, packed, whole, width * lanes);
        const int64_t n_whole = used - used % lanes;
        for (int64_t m = 0; m < rows; ++m) {
            const T* in = whole + m * width * lanes;
            T* out = result + m * n_columns;
            for (int64_t n = 0; n < n_whole; n += lanes) Vector::loadu(in + n).store(out + n);
            copy_few<false>(in + n_whole, out + n_whole, used - n_whole);
        }
    }

    // all rows that fit, blocks of `rows` each; the last block may take rows once more: the same numbers again
    template <int64_t rows, int64_t width>
    void blocks(const T* left, const T* packed, T* result, int64_t n, int64_t used) const {
        for (int64_t begin = 0; begin < n; begin += rows) {
            const int64_t m = std::min(begin, n - rows);
            part<rows, width>(left + m * row_stride, packed, result + m * n_columns, used);
        }
    }

    // as few blocks as hold all rows, all of them as high as the highest must be
    template <int64_t width, int64_t rows = std::min<int64_t>(8, n_sums / width)>
    void panel(const T* left, const T* packed, T* result, int64_t n, int64_t used) const {
        constexpr int64_t most = std::min<int64_t>(8, n_sums / width);
        const int64_t n_blocks = (n + most - 1) / most;
        if constexpr (rows > 1)
            if (n <= n_blocks * (rows - 1)) return panel<width, rows - 1>(left, packed, result, n, used);
        blocks<rows, width>(left, packed, result, n, used);
    }

    void rows(const T* left, const T* packed, T* result, int64_t n) const {
        for (int64_t p = 0; p < n_panels(); ++p) {
            const int64_t begin = panel_begin(p), width = panel_begin(p + 1) - begin;
            const int64_t used = n_columns - begin * lanes;
            const T* right = packed + begin * lanes * n_inner;
            T* out = result + begin * lanes;
            if (width == 3) panel<3>(left, right, out, n, used);
            else if (width == 2) panel<2>(left, right, out, n, used);
            else panel<1>(left, right, out, n, used);
        }
    }

    // one product with a long inner axis, as in gradients of weights: sums over parts of it, then over the parts
    void in_parts(const T* left, const T* right, T* result, bool parallel) const {
        const int64_t size = n_rows * n_columns;
        if (size == 0) return;
        const int64_t most = std::clamp<int64_t>(max_sums / size, 1, 64);
        const int64_t n_parts = std::min(most, (n_inner + long_inner - 1) / long_inner);
        const int64_t length = (n_inner + n_parts - 1) / n_parts;
        const std::unique_ptr<T[]> sums(new T[n_parts * size]);
#pragma omp parallel if (parallel)
        {
            Product part = *this;
            part.n_inner = length;
            const std::unique_ptr<T[]> packed(new T[part.packed_size()]);
#pragma omp for
            for (int64_t i = 0; i < n_parts; ++i) {
                part.n_inner = std::min(length, n_inner - i * length);
                const T* first = right + i * length * right_inner_stride;
                for (int64_t p = 0; p < n_panels(); ++p) part.pack(first, packed.get(), p);
                part.rows(left + i * length * inner_stride, packed.get(), sums.get() + i * size, n_rows);
            }
#pragma omp for
            for (int64_t m = 0; m < n_rows; ++m) {
                T* out = result + m * n_columns;
                for (int64_t i = 0; i < n_parts; ++i) {
                    const T* in = sums.get() + i * size + m * n_columns;
                    for (int64_t n = 0; n < n_columns; ++n) out[n] = i ? out[n] + in[n] : in[n];
                }
            }
        }
    }

    // result[b] = left[b] right[b]; the result is contiguous
    void operator()(const T* left, const T* right, T* result, int64_t n_batch = 1,
                    int64_t left_stride = 0, int64_t right_stride = 0) const {
        const bool parallel = double(n_batch) * n_rows * n_columns * n_inner > min_parallel;
        if (n_batch == 1 && n_inner > 4 * long_inner) return in_parts(left, right, result, parallel);
        if (n_batch == 1 || right_stride == 0) {
            const std::unique_ptr<T[]> packed(new T[packed_size()]);
            const int64_t n_chunk = n_inner > 64 ? 24 : 48, n_chunks = (n_rows + n_chunk - 1) / n_chunk;
#pragma omp parallel if (parallel)
            {
#pragma omp for
                for (int64_t p = 0; p < n_panels(); ++p) pack(right, packed.get(), p);
#pragma omp for
                for (int64_t i = 0; i < n_batch * n_chunks; ++i) {
                    const int64_t b = i / n_chunks, m = i % n_chunks * n_chunk;
                    rows(left + b * left_stride + m * row_stride, packed.get(),
                         result + (b * n_rows + m) * n_columns, std::min(n_chunk, n_rows - m));
                }
            }
        } else {
#pragma omp parallel if (parallel)
            {
                const std::unique_ptr<T[]> packed(new T[packed_size()]);
#pragma omp for
                for (int64_t b = 0; b < n_batch; ++b) {
                    for (int64_t p = 0; p < n_panels(); ++p) pack(right + b * right_stride, packed.get(), p);
                    rows(left + b * left_stride, packed.get(), result + b * n_rows * n_columns, n_rows);
                }
            }
        }
    }
};

}  // namespace mtinfer
