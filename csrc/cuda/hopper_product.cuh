// A warpgroup's part of  D = left right + small_left small_right  on Hopper's matrix instructions.
//
//     left, small_left: 64 rows of a stage [rows, 64]    right, small_right: [cols, 64] of a stage
//     acc: [64, cols] float32 in registers, cols / 2 of each of 128 threads
//
// The operands stand in a ring of stages in shared memory (who waits for what: hopper_roles.h).

#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "../common/hopper_epilogue.h"

namespace decomp_kernels::cuda {

template <typename T>
struct MatrixElement;
template <>
struct MatrixElement<bf16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct MatrixElement<fp16> {
  using type = cutlass::half_t;
};

template <typename T, HopperTile tile>
struct Product {
  using Element = typename MatrixElement<T>::type;

  static constexpr auto kRightMajor =
      tile.right_by_cols() ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
  using Rows = cute::Int<tile.rows()>;
  using Cols = cute::Int<tile.cols>;
  using Depth = cute::Int<kDepth>;
  using Stages = cute::Int<tile.stages()>;

  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, Cols, Depth>,
                                 cute::GMMA::Major::K, kRightMajor>(),
      cute::Layout<cute::Shape<cute::Int<tile.rows() / kGroupRows>, cute::_1, cute::_1>>{}));
  using LeftLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<Element>{}, cute::Shape<Rows, Depth, Stages>{}));
  // The boxes of a right operand read by columns stand one after the other, 64 columns each.
  using RightAtom = std::conditional_t<
      tile.right_by_cols(), cute::GMMA::Layout_MN_SW128_Atom<Element>,
      cute::GMMA::Layout_K_SW128_Atom<Element>>;
  using RightOrder = std::conditional_t<
      tile.right_by_cols(), cute::Step<cute::_2, cute::_1, cute::_3>,
      cute::Step<cute::_1, cute::_2, cute::_3>>;
  using RightLayout = decltype(cute::tile_to_shape(
      RightAtom{}, cute::Shape<Cols, Depth, Stages>{}, RightOrder{}));

  // The matrix instructions must look for an element where the copy engine's boxes put it.
  static constexpr bool layouts_agree() {
    const decltype(cute::as_position_independent_swizzle_layout(LeftLayout{})) left{};
    const decltype(cute::as_position_independent_swizzle_layout(RightLayout{})) right{};
    for (int inner = 0; inner < kDepth; inner += 7) {
      for (int row = 0; row < tile.rows(); row += 5)
        if (left(row, inner, 0) != left_element(row, inner)) return false;
      for (int col = 0; col < tile.cols; col += 5)
        if (right(col, inner, 0) != right_element(tile, col, inner)) return false;
    }
    return left(0, 0, 1) == tile.left_elements() && right(0, 0, 1) == tile.right_elements();
  }
  static_assert(layouts_agree());

  // And a register must hold the element that the epilogue takes it for.
  static constexpr bool registers_agree() {
    using Atom = typename Mma::Atom;
    const typename Atom::LayoutC_TV held{};
    for (int thread = 0; thread < 128; thread += 3)
      for (int i = 0; i < tile.cols / 2; ++i) {
        const decomp_kernels::Element e = accumulator_element(thread, i);
        if (held(thread, i) != e.row + kGroupRows * e.col) return false;
      }
    return true;
  }
  static_assert(registers_agree());

  template <class Storage>
  CUTLASS_DEVICE static auto fragments(Storage& storage, int consumer) {
    const auto left = cute::make_tensor(cute::make_smem_ptr(storage.left), LeftLayout{});
    const auto right = cute::make_tensor(cute::make_smem_ptr(storage.right), RightLayout{});
    // The instruction takes the operands' place from a descriptor: all threads pass the first's.
    const auto part = Mma{}.get_slice(tile.ping_pong() ? 0 : consumer * 128);
    return cute::make_tuple(part.make_fragment_A(part.partition_A(left)),
                            part.make_fragment_B(part.partition_B(right)));
  }

  CUTLASS_DEVICE static auto accumulator() {
    return cute::partition_fragment_C(Mma{}, cute::Shape<Rows, Cols>{});
  }

  // acc += block ``block`` of a stage.
  template <class Fragments, class Accumulator>
  CUTLASS_DEVICE static void multiply(Fragments& f, Accumulator& acc, int stage, int block) {
    using cute::_;
    Mma mma;
    mma.accumulate_ = cute::GMMA::ScaleOut::One;  // acc starts as zeros
    cute::gemm(mma, cute::get<0>(f)(_, _, block, stage), cute::get<1>(f)(_, _, block, stage), acc);
  }
};

}  // namespace decomp_kernels::cuda
