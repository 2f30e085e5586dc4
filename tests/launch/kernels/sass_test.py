"""Counts of machine instructions, of what nvdisasm prints."""

import pytest

from launch.kernels import sass

# Lines of nvdisasm -c of a Hopper kernel.
TEXT = """
.text.product_mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0a80*/              @!P1 BRA `(.L_x_2) ;
.L_x_19:
        /*0f20*/                   HGMMA.64x128x16.F32 R24, gdesc[UR16], RZ, !UPT ;
        /*0f90*/                   HGMMA.64x128x16.F32.BF16 R24, R28, gdesc[UR8].tnspB, R24, gsb0 ;
        /*1020*/              @!UP1 UTMALDG.4D [UR8], [UR4], desc[UR6] ;
        /*1030*/                   UTMALDG.5D [UR8], [UR4] ;
        /*1040*/               @P0 UTMASTG.3D [UR8], [UR4] ;
        /*2000*/                   MUFU.EX2 R4, R4 ;
        /*2010*/                   MUFU.RCP R4, R4 ;
        /*2020*/               @P1 STL [R1+0x10], R8 ;
        /*2030*/                   LDL.LU R8, [R1+0x10] ;
        /*12340*/                   EXIT ;
.L_x_31:
        /*12350*/                   BRA `(.L_x_31);
        /*12360*/                   NOP;
"""


def test_instructions_are_counted_with_their_predicates():
    assert sass.parse(TEXT) == {
        "wgmma": 2,
        "tma_loads": 2,
        "tma_stores": 1,
        "exp2": 1,
        "spill_stores": 1,
        "spill_loads": 1,
        "instructions": 14,
    }


def tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_without_the_tools_nothing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sass.count(tmp_path / "kernel.ptx") is None
    tool(tmp_path, "ptxas", "exit 0")
    assert sass.count(tmp_path / "kernel.ptx") is None


def test_a_tool_that_refuses_is_quoted(tmp_path, monkeypatch):
    tool(tmp_path, "ptxas", "echo 'ptxas fatal: Unsupported .version 9.0'; exit 255")
    tool(tmp_path, "nvdisasm", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RuntimeError, match=r"ptxas ended with 255: .* Unsupported .version 9.0"):
        sass.count(tmp_path / "kernel.ptx")


def test_what_the_tools_make_of_the_file_is_counted(tmp_path, monkeypatch):
    tool(tmp_path, "ptxas", 'cp "$2" "$4"')
    tool(tmp_path, "nvdisasm", 'cat "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "kernel.ptx").write_text(TEXT)
    assert sass.count(tmp_path / "kernel.ptx") == sass.parse(TEXT)
