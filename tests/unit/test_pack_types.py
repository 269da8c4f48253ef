"""packing.types: which type each tensor gets."""

from __future__ import annotations

import pytest
from gguf import LlamaFileType

from pipo.base.errors import UsageError
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.packing.types import MIXES, Mix, TensorPlan, fitting, parse_mix, plan_tensor

T = TensorType


def spec(name: str, shape: tuple[int, ...], type_: T = T.F16) -> TensorSpec:
    return TensorSpec(name, type_, shape, Extent(FileIdx(0), 0, type_.nbytes(shape)))


def type_of(name: str, shape: tuple[int, ...], target: T | Mix, source: T = T.F16, *, moves: bool = True) -> T:
    return plan(spec(name, shape, source), target, moves=moves).type


def plan(spec: TensorSpec, target: T | Mix, *, moves: bool = True) -> TensorPlan:
    return plan_tensor(spec, target if isinstance(target, Mix) else MIXES[target.name.lower()], 32, moves=moves)


@pytest.mark.parametrize("name", MIXES)
def test_every_type_is_one_that_libggml_computes_and_llama_cpp_names(name: str) -> None:
    mix = parse_mix(name.upper())
    assert ggml.load().multiplies(mix.type)
    named = LlamaFileType(mix.file_type).name
    assert named.removesuffix("_S") in (f"MOSTLY_{mix.name}", f"ALL_{mix.name}")


def test_unknown_types_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="iq1_s") as refused:
        parse_mix("iq1_s")
    assert "q4_k" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("wanted", "row", "used"),
    [
        (T.Q4_K, 512, T.Q4_K), (T.Q4_K, 576, T.Q5_0), (T.Q5_K, 576, T.Q5_1), (T.Q6_K, 576, T.Q8_0),
        (T.Q2_K, 576, T.Q4_0), (T.Q3_K, 576, T.Q4_0), (T.IQ4_XS, 576, T.IQ4_NL), (T.Q4_K, 72, T.F16),
        (T.Q4_0, 48, T.F16), (T.Q8_0, 31, T.F16), (T.F16, 31, T.F16), (T.BF16, 31, T.BF16),
    ],
)  # fmt: skip
def test_a_block_that_does_not_divide_a_row_gives_way(wanted: T, row: int, used: T) -> None:
    assert fitting(wanted, row) is used
    assert row % used.block_elems == 0


@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
def test_tables_keep_six_bits_at_least(name: str) -> None:
    for target in (T.Q2_K, T.Q4_0, T.Q4_K, T.Q5_1, T.IQ4_NL):
        assert type_of(name, (512, 100), target) is T.Q6_K
        assert type_of(name, (576, 100), target) is T.Q8_0
    for target in (T.Q6_K, T.Q8_0, T.F16, T.BF16, T.F32):
        assert type_of(name, (512, 100), target) is target


def test_what_stays_in_ram_is_f32() -> None:
    for source in (T.F32, T.F16, T.BF16):
        assert type_of("blk.0.attn_norm.weight", (64,), T.Q4_0, source, moves=False) is T.F32
        assert type_of("blk.0.ffn_gate_inp.weight", (64, 8), T.Q4_0, source, moves=False) is T.F32
    assert type_of("a.vector", (64,), T.Q4_0, T.F32) is T.F32  # however it moves
    assert type_of("blk.0.ffn_up_exps.bias", (64, 8), T.Q4_0, T.F32) is T.F32  # of experts
    assert type_of("a.table", (64, 2), T.Q4_0, T.I32, moves=False) is T.I32  # numbers are copied


def test_experts_are_matrices() -> None:
    bank = plan(spec("blk.0.ffn_up_exps.weight", (64, 32, 8)), T.Q4_0)
    assert (bank.type, bank.num_rows, bank.num_bytes) == (T.Q4_0, 256, 256 * 36)


def test_what_has_the_type_already_is_copied_and_not_quantised_twice() -> None:
    same = plan(spec("m.weight", (256, 4), T.Q4_0), T.Q4_0)
    assert same.is_copied and not same.is_requantised
    assert plan(spec("m.weight", (256, 4), T.Q4_1), T.Q4_0).is_requantised
    assert not plan(spec("m.weight", (256, 4), T.BF16), T.Q4_0).is_requantised
    assert plan(spec("m.weight", (256, 4), T.Q8_0), T.F16).is_requantised


def test_mixtures_give_more_bits_where_they_help() -> None:
    more = [i for i in range(32) if type_of(f"blk.{i}.attn_v.weight", (256, 4), MIXES["q4_k_m"]) is T.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for name in ("ffn_down", "ffn_down_exps"):
        assert type_of(f"blk.6.{name}.weight", (256, 4), MIXES["q5_k_m"]) is T.Q6_K
        assert type_of(f"blk.5.{name}.weight", (256, 4), MIXES["q5_k_m"]) is T.Q5_K
        assert type_of(f"blk.6.{name}.weight", (256, 4), MIXES["q4_k"]) is T.Q4_K
    assert type_of("blk.5.attn_qkv.weight", (256, 4), MIXES["q4_k_m"]) is T.Q5_K
    assert type_of("blk.6.ffn_up.weight", (256, 4), MIXES["q4_k_m"]) is T.Q4_K
    assert type_of("blk.6.attn_v.weight", (288, 4), MIXES["q4_k_m"]) is T.Q8_0  # for want of blocks
