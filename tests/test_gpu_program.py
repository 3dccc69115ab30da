"""How kernels are counted in the text of a compiled program: what `experiments/benchmarks/gpu_program.py` says rests on
it. A GPU's program as XLA writes it, shortened, and programs that are compiled here for the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import script

hlo = script("benchmarks/hlo")

GPU = """\
HloModule jit_run, is_scheduled=true, entry_computation_layout={(f32[100,8]{1,0}, s32[])->(f32[100,8]{1,0}, s32[])}

%fused_write (param_0: f32[100,8], param_1: f32[1,8], param_2: s32[]) -> f32[100,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  %param_1 = f32[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %write = f32[100,8]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %zero)
}

%fused_scale (param_0.1: f32[100,8]) -> (f32[100,8], f32[]) {
  %param_0.1 = f32[100,8]{1,0} parameter(0)
  %twice = f32[100,8]{1,0} add(%param_0.1, %param_0.1)
  %nothing = f32[] constant(0)
  ROOT %both = (f32[100,8]{1,0}, f32[]) tuple(%twice, %nothing)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%command_buffer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %gemm = (f32[8]{0}, s8[4096]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm"
  %product = f32[8]{0} get-tuple-element(%gemm), index=0
  %start = (f32[8]{0}, f32[]) all-reduce-start(%product, %product), replica_groups={{0,1}}, to_apply=%sum
  %done = (f32[8]{0}, f32[]) all-reduce-done(%start)
  ROOT %mean = f32[8]{0} get-tuple-element(%done), index=0
}

%update (t: (s32[], f32[8], /*index=2*/f32[100,8])) -> (s32[], f32[8], f32[100,8]) {
  %t = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %ring = f32[100,8]{1,0} get-tuple-element(%t), index=2
  %call = f32[8]{0} call(%x), to_apply=%command_buffer
  %copy = f32[100,8]{1,0} copy(%ring), metadata={op_name="jit(run)/while/body/copy"}
  ROOT %out = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) tuple(%i, %call, %copy)
}

%test (t.1: (s32[], f32[8], /*index=2*/f32[100,8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %less = pred[] fusion(%i.1), kind=kLoop, calls=%sum
}

%act (u: f32[8]) -> f32[8] {
  %u = f32[8]{0} parameter(0)
  ROOT %step = f32[8]{0} fusion(%u), kind=kLoop, calls=%sum
}

%iteration (v: (s32[], f32[8], /*index=2*/f32[100,8])) -> (s32[], f32[8], f32[100,8]) {
  %v = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) parameter(0)
  %x.1 = f32[8]{0} get-tuple-element(%v), index=1
  %ring.1 = f32[100,8]{1,0} get-tuple-element(%v), index=2
  %acted = f32[8]{0} while(%x.1), condition=%test, body=%act, backend_config={"known_trip_count":{"n":"5"}}
  %row = f32[1,8]{1,0} bitcast(%acted)
  %stored = f32[100,8]{1,0} fusion(%ring.1, %row), kind=kLoop, calls=%fused_write
  %scaled = (f32[100,8]{1,0}, f32[]) fusion(%stored), kind=kLoop, calls=%fused_scale
  ROOT %learned = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) while(%v), condition=%test, body=%update
}

ENTRY %main (w: (s32[], f32[8], /*index=2*/f32[100,8])) -> (s32[], f32[8], f32[100,8]) {
  %w = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) parameter(0)
  %first = f32[100,8]{1,0} copy(%w)
  ROOT %trained = (s32[], f32[8]{0}, /*index=2*/f32[100,8]{1,0}) while(%w), condition=%test, body=%iteration
}
"""


def test_kernels_of_a_gpu_program():
    """Through the call, the loop of known length times its turns, each once for a loop whose length nobody knows."""
    found = [(k.instruction.name, k.times, k.depth) for k in hlo.kernels(hlo.parse(GPU))]
    assert found == [
        ("first", 1, 0),
        ("step", 5, 1),
        ("stored", 1, 1),
        ("scaled", 1, 1),
        ("gemm", 1, 2),
        ("start", 1, 2),
        ("copy", 1, 2),
    ]


def test_what_writes_a_whole_array_where_a_part_would_do():
    program = hlo.parse(GPU)
    launched = [kernel for kernel in hlo.kernels(program) if kernel.depth]
    assert hlo.written_whole(program, launched, {("f32", 800)}) == ["scaled", "copy"]
    assert hlo.written_whole(program, launched, {("s32", 800), ("f32", 801)}) == []


def test_arrays_of_a_result():
    [start] = [k.instruction for k in hlo.kernels(hlo.parse(GPU)) if k.instruction.name == "start"]
    assert start.arrays == [("f32", 8), ("f32", 1)]
    types = [hlo.element_type(np.dtype(name)) for name in ("bool", "uint8", "int32", "float32")]
    assert types == ["pred", "u8", "s32", "f32"]


def test_a_conditional_is_refused():
    text = GPU.replace("custom-call(%p, %p)", "conditional(%p, %p)")
    with pytest.raises(ValueError, match="gemm is a conditional"):
        list(hlo.kernels(hlo.parse(text)))


@pytest.mark.parametrize("in_place", [True, False])
def test_programs_as_jax_compiles_them(in_place):
    """A scan of seven turns inside a loop with traced bounds, over an array that is written in part or as a whole."""

    def iterate(i, ring):
        row = ring[0] + jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), ()), ring[:4], None, length=7)[0][0]
        return jax.lax.dynamic_update_slice(ring, row[None], (i % 50, 0)) if in_place else jnp.roll(ring, i, 0) + row

    run = jax.jit(lambda ring, stop: jax.lax.fori_loop(0, stop, iterate, ring), donate_argnums=0)
    program = hlo.parse(run.lower(jnp.zeros((50, 4)), 3).compile().as_text())
    launched = [kernel for kernel in hlo.kernels(program) if kernel.depth]
    assert {kernel.depth for kernel in launched} == {1}
    assert {kernel.times for kernel in launched} == {1, 7}
    assert bool(hlo.written_whole(program, launched, {("f32", 200)})) != in_place
