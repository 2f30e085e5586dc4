"""Proves kernels without their hardware: compiles them for it and reads what the compilers say.

What an op is: a folder pallas_kernels/<op>/, whose `__init__` has a function <op>, and

- `specs.py` with SPECS, `tagged(tag)` and a frozen dataclass Spec of
    name, tag                        'aot' among the tags: compiled by --all and by the tests
    abstract(dtype)                  {argument: (shape, dtype)} of the arrays
    call(implementation, config)     a function of the arrays by name, which gives a tree of arrays
    differentiable                   names of the arrays that have a gradient
    flops, backward_flops            that the results need, whatever a kernel computes besides
    hbm_bytes(dtype, backward)       the fewest bytes to be moved;
- implementations, each a module <implementation>.py with a frozen dataclass Config of plain values;
  those for TPUs have `executions(spec, config) -> {kernel: [runs]}`: how often each heavy piece of
  the kernel's program runs in one call (`llo.Program.heavy`), and may have
  `candidates(spec) -> configs` for --tune. Kernels of the backward pass have 'backward' in their
  names.

Kernels of others to compare with are in peers/<op>/<name>.py here: PLATFORM, Config, `best()`,
`can(spec)`, `call(spec, config)` and, for TPUs, `runs(spec, config, kernel, program, grid)`.

Nothing else names an op: a copy of the folder is another.
"""
