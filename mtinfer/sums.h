// Sums over rows of a matrix (T: double or float), listed group by group.
//
// Each sum has the order of its list, whatever the number of threads, and stays in registers while the list is read.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace mtinfer {

// result[g, d] = sum over the entries k of group g of weights[k, d] x[rows[k]]; with n_weights = 0: of x[rows[k]]
template <class T, int64_t n_weights>
struct Sums {
    using Vector = at::vec::Vectorized<T>;
    static constexpr int64_t lanes = Vector::size();
    static constexpr int64_t depth = std::max<int64_t>(1, n_weights);
    static constexpr int64_t max_width = depth == 1 ? 8 : 4;  // vectors of columns that are summed at a time
    static constexpr double min_parallel = 3e4;               // numbers worth more than one thread

    int64_t n_groups, n_entries, n_columns;

    template <int64_t width>
    void columns(const T* weights, const T* x, const int64_t* rows, int64_t n, T* result, int64_t used) const {
        Vector sums[depth][width];
        for (auto& of_weight : sums)
            for (auto& sum : of_weight) sum = Vector(T(0));
        for (int64_t k = 0; k < n; ++k) {
            const T* row = x + rows[k] * n_columns;
#pragma GCC unroll 8
            for (int64_t v = 0; v < width; ++v) {
                const Vector here = used < lanes ? Vector::loadu(row, used) : Vector::loadu(row + v * lanes);
#pragma GCC unroll 3
                for (int64_t d = 0; d < depth; ++d) {
                    if constexpr (n_weights == 0) sums[d][v] = sums[d][v] + here;
                    else sums[d][v] = at::vec::fmadd(Vector(weights[k * n_weights + d]), here, sums[d][v]);
                }
            }
        }
        for (int64_t d = 0; d < depth; ++d)
            for (int64_t v = 0; v < width; ++v)
                sums[d][v].store(result + d * n_columns + v * lanes, std::min(used, lanes));
    }

    // starts: where the entries of each group begin; those of a group are consecutive
    void operator()(const T* weights, const T* x, const int64_t* rows, const int64_t* starts, T* result) const {
#pragma omp parallel for if (double(n_entries) * depth * n_columns > min_parallel)
        for (int64_t g = 0; g < n_groups; ++g) {
            const int64_t begin = starts[g], n = (g + 1 < n_groups ? starts[g + 1] : n_entries) - begin;
            const T* own = weights + begin * n_weights;
            T* out = result + g * depth * n_columns;
            int64_t c = 0;
            for (; c + max_width * lanes <= n_columns; c += max_width * lanes)
                columns<max_width>(own, x + c, rows + begin, n, out + c, max_width * lanes);
            for (; c < n_columns; c += lanes)
                columns<1>(own, x + c, rows + begin, n, out + c, std::min(lanes, n_columns - c));
        }
    }
};

}  // namespace mtinfer
