"""The reader of compilers' schedules that benchmarks/tpu_schedule.py counts with."""

import collections

import pytest

from benchmarks import llo

# A branch over two bundles with a product; a loop around a loop; what issues behind a branch.
PROGRAM = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0  ;;  %s2 = inlined_call_operand.vmem [shape: s32[32]] /* operand 0 */ }
   0x1   :  { %3 = sbr.rel (%p4) target = $region7 }
   0x2   :  { %v5 = vmatmul.bf16.gmra.mxu0 %v6 } /* Start region 6 */
   0x3   :  {} /* End region 6 */
   0x4 LB: > { %s8 = sadd.s32 1, %s1 } /* Start/End empty region 7 :: Start region 9 */
   0x5 LB: >> { %v10 = vld [vmem:[%s2] sm:$0xff]  ;;  %11 = vmatmul.bf16.gmra.mxu1 %v10 } /* Start region 12 */
   0x6   : > { %s13 = smov.u32 (%p14), %s15 /* moved out: %v1 = vmatmul.bf16 :: of
another line */ }
   0x7   : >> { %16 = sbr.rel (!%p14) target = $region12 }
   0x8   :  {}
   0x9   : >> { %17 = vst [vmem:[#allocation2_spill]] /*vst_source=*/%v10  ;;  %18 = vexp2.f32 %v10 } /* End region 12 */
   0xa   : > { %19 = sbr.rel (!%p20) target = $region9 } /* End region 9 */
   0xb   :  { %21 = shalt.err }
"""  # noqa: E501
USE = """== CAPACTIY:
MATMUL, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    4     3     3     1     1
== UTILIZATION:
0 0 0 0 0
0 0 0 0 0
4 0 0 0 0
0 0 0 0 0
0 0 0 0 0
2 3 1 0 0
0 0 0 0 0
0 0 0 0 0
0 0 0 0 0
0 0 0 1 1
0 0 0 0 0
0 0 0 0 0
"""


def test_inner_loop():
    (body,) = llo.parse(PROGRAM, USE).loops()
    assert (body.first, body.bundles, body.fills, body.spills) == (5, 5, 1, 1)
    assert body.use == {"MATMUL": 2 / 20, "VLOAD": 3 / 15, "VSTORE": 1 / 5}
    operations = ["vld", "vmatmul.bf16.gmra.mxu1", "smov.u32", "sbr.rel", "vst", "vexp2.f32"]
    assert body.operations == collections.Counter(operations)
    assert body.count("vmatmul") == body.count(r"v(exp|pow)2\.f32") == 1


def test_places_hold_what_issues_behind_the_branch():
    assert llo.parse(PROGRAM, USE).places() == [(4, 11), (5, 10)]


def test_runs_end_at_branches():
    runs = llo.parse(PROGRAM, USE).runs()
    assert [(run.first, run.bundles) for run in runs] == [(2, 2), (5, 3)]


def test_files_must_belong_together():
    with pytest.raises(ValueError, match="12 bundles, but the use of 11"):
        llo.parse(PROGRAM, USE.rsplit("\n", 2)[0])


def test_read_finds_one_program(tmp_path):
    def write(stamp: int):
        for name, text in (("final_bundles", PROGRAM), ("schedule-analysis_final_bundles", "")):
            (tmp_path / f"{stamp}-some_kernel.1-72-{name}.txt").write_text(text)
        use = tmp_path / f"{stamp}-some_kernel.1-70-final_hlo-static-per-bundle-utilization.txt"
        use.write_text(USE)

    write(1)
    assert len(llo.read(tmp_path, "some_kernel").bundles) == 12
    with pytest.raises(LookupError, match=r"other_kernel.*not none"):
        llo.read(tmp_path, "other_kernel")
    write(2)
    with pytest.raises(LookupError, match="some_kernel"):
        llo.read(tmp_path, "some_kernel")


def body_with(**operations: int) -> llo.Body:
    counts = {name.replace("_", "."): number for name, number in operations.items()}
    return llo.Body(0, 1000, {"VALU": 0.5}, 3, 4, collections.Counter(counts))


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("maxima", [0, 1])
@pytest.mark.parametrize("gates", [0, 1])
def test_cost_is_that_of_one_tile(tiles, maxima, gates):
    # A tile of 256 x 512 has 128 registers of pairs and 32 rows of registers.
    exponentials = tiles * (128 * (1 + gates) + 32 * maxima)
    body = body_with(vexp2_f32=exponentials, vrcp_f32=gates * tiles * 128, vcmp_ge_s32=1)
    cost = llo.attention_cost(body, 256, 512, maxima)
    assert (cost["tiles"], cost["certain"], cost["masked"]) == (tiles, True, False)
    assert cost["label"] == ("counting" if gates else "plain")
    assert cost["per_pairs"] == 1000 / tiles / 8


def test_cost_tells_masks_and_what_it_cannot_tell():
    body = body_with(vexp2_f32=128, vcmp_ge_s32_totalorder=128)
    assert llo.attention_cost(body, 256, 512, 0)["masked"]
    assert not llo.attention_cost(body_with(vexp2_f32=190), 256, 512, 0)["certain"]
    assert not llo.attention_cost(body_with(vexp2_f32=64), 256, 512, 0)["certain"]
