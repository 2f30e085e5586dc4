"""The parser against a small kernel's dump, whose answers can be counted by hand.

data/excerpt is what libtpu 0.0.48 dumped for a v5p of this kernel (names of operands left out):
grid (4, 2), the first dimension parallel; x [128 128] and y [128 512] a step, acc [128 512] float32
in VMEM, which is 64 registers of [8 128]:

    when j == 0: acc = 0
    when j <= i: s = exp(x @ y); s = s / rowsum(s); acc += s * s
    for t in range(i + 3): acc[8 t: 8 t + 8] = exp(acc[8 t: 8 t + 8])
    when j == 1: o = bfloat16(acc)
"""

import dataclasses
import json
import pathlib
import shutil

import pytest

from launch.kernels import llo
from launch.kernels.program import Program, render

FOLDER = pathlib.Path(__file__).parent / "data/excerpt"


@pytest.fixture(scope="module")
def program():
    (found,) = llo.read(FOLDER)["excerpt"]
    return found


def test_slots_and_grid(program):
    capacity = "MXU 4 XLU 3 VALU 4 VPOP 2 EUP 1 VLOAD 3 VLOAD:FILL 3 VSTORE 1 VSTORE:SPILL 1 SALU 2"
    words = capacity.split()
    assert program.capacity == dict(zip(words[::2], map(int, words[1::2]), strict=True))
    # 8 steps over two cores; the loop runs two turns more, to fetch ahead and to write back.
    assert (program.bound, program.megacore, program.steps) == (6, True, 4)


def test_pieces_cover_the_program(program):
    assert program.pieces[0].start == 0
    for before, after in zip(program.pieces, program.pieces[1:], strict=False):
        assert before.stop == after.start
    assert program.pieces[-1].stop == 619  # 0x26b, of the last line's address 0x26a
    assert sum(piece.cycles for piece in program.pieces) == 849  # rows of the schedule's table


def test_heavy_pieces_are_the_bodies(program):
    zero, product, loop = program.heavy
    assert [p.depth for p in program.heavy] == [1, 1, 2]
    assert [len(p.inside) for p in program.heavy] == [2, 2, 2]
    assert {p.inside[0] for p in program.heavy} == {32}  # the pipeline's own: a step, or none
    assert len({p.inside[1] for p in program.heavy}) == 3
    assert zero.slots["VSTORE"] == 64  # acc = 0
    assert zero.slots["MXU"] == product.slots["XLU"] - 141 == loop.slots["MXU"] == 0
    # x @ y: 128 x 128 x 512 over [128 128] units is 512 rows; 16 rows a matmul of bfloat16.
    assert (product.slots["MXU"], product.matmuls, product.pushes) == (512, 512 // 16, 4 * 8)
    # exp: 64 registers in s; division: a reciprocal for each of 16 row groups.
    assert product.slots["EUP"] == 64 + 16
    assert (product.slots["VSTORE:SPILL"], product.slots["VLOAD:FILL"]) == (29, 29)
    # A row group of acc is 4 registers: loaded, exp and stored.
    assert [loop.slots[name] for name in ("VLOAD", "EUP", "VSTORE")] == [4, 4, 4]


def test_waits_are_cycles_and_no_bundles(program):
    zero, product, loop = program.heavy
    assert [p.bundles for p in (zero, product, loop)] == [65, 327, 18]
    assert [p.cycles for p in (zero, product, loop)] == [65, 447, 22]
    bundles, capacity = [], []
    for path in sorted(FOLDER.glob("*utilization.txt")):
        found, rows = llo.table(path.read_text())
        bundles.append(sum(row[-1] for row in rows))  # the scalar unit's instructions
        capacity.append(found)
    assert bundles[0] == bundles[1] == sum(p.slots["SALU"] for p in program.pieces)
    assert capacity == [program.capacity] * 2


def test_what_only_steers_is_not_heavy(program):
    control = program.pieces[1]
    assert control.bundles == 75
    assert control.depth == 1
    assert control not in program.heavy


def test_vector_memory(program):
    # acc, and x, y and o twice each for the pipeline; then spilled registers of 4 KiB.
    windows = 4 * 128 * 512 + 2 * 2 * (128 * 128 + 128 * 512 + 128 * 512)
    assert program.vmem - windows == 29 * 4096


def test_profile_is_of_shares(program):
    cycles = 849
    mean = sum(program.profile["MXU"]) / len(program.profile["MXU"])
    # A part is 2 or 3 cycles long and all count alike here, so the mean is only near.
    assert mean == pytest.approx(512 / 4 / cycles, rel=0.05)
    assert all(0 <= share <= 1 for shares in program.profile.values() for share in shares)


def test_plain_and_back(program):
    assert Program.from_plain(json.loads(json.dumps(program.plain()))) == program


def test_rendered(program):
    lines = render(program).splitlines()
    assert lines[0] == "excerpt: 619 bundles, 849 cycles, 4 grid steps on each core"
    assert len(lines) == 2 + len(program.pieces)
    assert sum(line.endswith("*") for line in lines) == 3


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("72-final_bundles.txt", lambda text: text[: text.rindex("\n 0x26a")], "618 bundles.*619"),
        (
            "70-final_hlo-static-per-bundle-utilization.txt",
            lambda text: text.replace("== UTIL", "== USE"),
            "no '== UTILIZATION:'",
        ),
        (
            "68-pre-delay_hlo-static-per-bundle-utilization.txt",
            lambda text: text[: text.rstrip().rindex("\n")] + "\n0 0 9 0 0 0 0 0 0 0\n",
            "schedule issues",
        ),
        ("69-post-delay-converter.txt", lambda text: None, "has 0 files"),
    ],
)
def test_other_dumps_are_one_sentence(tmp_path, file, change, message):
    folder = shutil.copytree(FOLDER, tmp_path / "dump")
    path = folder / f"1-excerpt.1-{file}"
    text = change(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(llo.DumpError, match=message) as error:
        llo.read(folder)
    assert "\n" not in str(error.value)


def test_a_piece_behind_no_branch_has_none(program):
    assert program.pieces[1].inside == ()
    assert dataclasses.replace(program, bound=None).steps == 1
