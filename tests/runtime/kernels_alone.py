"""Calls every kernel of kernels.cc as MindSpore would, but without it, for a sanitizer to look on.

    python tests/runtime/kernels_alone.py LIBRARY ONEDNN OUTPUTS NAME ...

Inputs are made from the sizes that a kernel names, and from some that do not fit, each in an allocation of its own:
MindSpore's tensors lie side by side in one, where it is not seen that a kernel reads beyond its input. What came out
where they fit goes into the file OUTPUTS, for other libraries to be compared.
"""

import ctypes
import itertools
import os
import re
import sys

import numpy as np

SIZES = [
    {
        "B": 1,
        "S": 5,
        "T": 3,
        "L": 7,
        "D": 8,
        "d": 4,
        "W": 12,
        "H": 6,
        "E": 8,
        "K": 4,
        "N": 5,
        "M": 9,
        "C": 3,
        "...": (3,),
    },
    {"B": 2, "S": 1, "T": 1, "L": 1, "D": 2, "d": 2, "W": 1, "H": 1, "E": 1, "K": 1, "N": 1, "M": 2, "C": 1, "...": ()},
    {"B": 2, "S": 65, "T": 36, "L": 99, "D": 72, "d": 36, "W": 99, "H": 77, "E": 50, "K": 9, "N": 300, "C": 40}
    | {"M": 600, "...": (130, 3)},
    {"B": 1, "S": 300, "T": 40, "L": 333, "D": 64, "d": 32, "W": 128, "H": 64, "E": 64, "K": 99, "N": 700, "C": 16}
    | {"M": 700, "...": (2, 200)},
]
"""What letters and dots stand for: less than a tile, one each, odd ones and several threads' work."""


ONE = np.ones((), np.float32)

WHOLE = {"decision": 2, "euler_step": 3}
"""The input that is a whole number: of a step."""


def shape_of(named, sizes):
    """The shape that a kernel names, such as "B T+S 3D"; "1" is a scalar."""
    shape = ()
    for axis in () if named == "1" else named.split():
        shape += sizes["..."] if axis == "..." else (sum(term_of(term, sizes) for term in axis.split("+")),)
    return shape


def term_of(term, sizes):
    factor, letter = re.fullmatch(r"(\d*)([A-Za-z]?)", term).groups()
    return int(factor or 1) * (sizes[letter] if letter else 1)


def described(shapes):
    """Ranks and shapes as a kernel is given them."""
    sizes = [(ctypes.c_int64 * len(shape))(*shape) for shape in shapes]
    pointers = (ctypes.POINTER(ctypes.c_int64) * len(sizes))(*(ctypes.POINTER(ctypes.c_int64)(each) for each in sizes))
    return (ctypes.c_int * len(sizes))(*map(len, sizes)), pointers


def function(library, name):
    found = getattr(library, name)
    found.restype = ctypes.c_char_p
    return found


def call(library, name, inputs, runs=False):
    """A kernel's outputs, and what it says where it refuses the inputs; as it does where it is asked for shapes.

    What ``runs`` is refused there alone.
    """
    sizes = (ctypes.c_int64 * 64)(-1)
    refused = function(library, f"{name}_shapes")(*described([x.shape for x in inputs]), sizes)
    numbers, outputs = iter(sizes), []
    for rank in iter(lambda: next(numbers), -1):
        outputs.append(np.full(tuple(itertools.islice(numbers, rank)), np.nan, np.float32))
    tensors = inputs + outputs
    addresses = (ctypes.c_void_p * len(tensors))(*(x.ctypes.data for x in tensors))
    said = function(library, f"{name}_called")(len(tensors), addresses, *described([x.shape for x in tensors]))
    assert refused in (None, said) or runs, f"{name}: {refused} where it is compiled, {said} where it runs"
    return outputs, said


def misfits(shapes):
    """Shapes one of which is another: a size more or less, an axis more or less."""
    for index, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            for other in (size - 1, size + 1):
                yield index, shape[:axis] + (other,) + shape[axis + 1 :]
        yield index, shape + (2,)
        if shape:
            yield index, shape[1:]


def typed(name, named, inputs):
    """A kernel's inputs in the types that it reads: a matrix has a vector of as many numbers as its rows behind it."""
    if name in WHOLE:
        inputs[WHOLE[name]] = np.zeros((), np.int32)
    for index, axes in enumerate(named[:-1]):
        if len(axes.split()) == 2 and axes.split()[0] == named[index + 1]:
            if name.endswith("_bfloat16"):
                inputs[index] = (inputs[index].view(np.uint32) >> 16).astype(np.uint16)
            elif name.endswith("_int8"):
                inputs[index] = (100 * (inputs[index] - 1)).astype(np.int8)
    return inputs


def named_by(library, name):
    """The sizes of a kernel's inputs, in letters."""
    return function(library, f"{name}_named")().decode().split(", ")


def inputs_of(library, name, sizes, rng):
    """A kernel's inputs of these sizes; one group, one filled order."""
    named = named_by(library, name)
    shapes = [shape_of(each, sizes) for each in named]
    inputs = [rng.uniform(0.5, 1.5, shape).astype(np.float32) if shape else ONE for shape in shapes]
    return typed(name, named, inputs)


def check_placed(library, name, rng):
    """A kernel that is told where its weights lie gives what it gives with the weights, and refuses others."""
    whole, said = name.removesuffix("_placed"), []
    streams, last = len(named_by(library, name)) - 2, np.ones((1, 8), np.float32)
    for sizes in SIZES:
        inputs = inputs_of(library, whole, sizes, rng)
        (places,), refused = call(library, f"{whole}_places", inputs[streams:])
        assert refused is None
        table, row = [np.concatenate((last, places, last))], [np.float32([1])]
        wanted = call(library, whole, inputs)
        given = call(library, name, inputs[:streams] + table + row)
        assert wanted[1] is given[1] is None
        assert all(np.array_equal(*pair) for pair in zip(wanted[0], given[0])), name
        wider = inputs_of(library, whole, {**sizes, "D": 2 * sizes["D"]}, rng)[:streams]
        said.append(call(library, name, wider + table + row, runs=True)[1])
        for beyond in (-1, len(table[0]) - len(places) + 1):
            said.append(call(library, name, inputs[:streams] + table + [np.float32([beyond])], runs=True)[1])
    assert None not in said, name


def check(library, name, rng):
    """Calls a kernel with all that it may be given; its outputs where that fits."""
    fitting = []
    for sizes in SIZES:
        inputs = inputs_of(library, name, sizes, rng)
        shapes = [x.shape for x in inputs]
        outputs, said = call(library, name, inputs)
        assert said is None and all(np.isfinite(y).all() for y in outputs), f"{name}: {said or outputs}"
        fitting += [y.ravel() for y in outputs]
        # What is no number goes through too, except where it says how many.
        call(library, name, [np.full_like(x, np.nan) if x.ndim and x.dtype == np.float32 else x for x in inputs])
        if name in WHOLE:
            place = WHOLE[name]
            for beyond in (-1, 10**6):
                others = inputs[:place] + [np.full_like(inputs[place], beyond)] + inputs[place + 1 :]
                said = call(library, name, others, runs=True)[1]
                assert said is not None and said.decode().startswith(f"{name}: step {beyond} of "), said
        if sizes is SIZES[0]:
            for index, shape in misfits(shapes):
                others = inputs[:index] + [np.ones(shape, np.float32)] + inputs[index + 1 :]
                call(library, name, others)
    return np.concatenate(fitting)


def main(library, onednn, outputs, *names):
    # A test's worker may have one processor; kernels shall share their work.
    os.sched_setaffinity(0, range(os.cpu_count()))
    ctypes.CDLL(onednn)
    library = ctypes.CDLL(library)
    placed = [name for name in names if name.endswith("_placed")]
    for name in placed:
        check_placed(library, name, np.random.default_rng(0))
    others = [name for name in names if not name.endswith(("_placed", "_places"))]
    np.savez(outputs, **{name: check(library, name, np.random.default_rng(0)) for name in others})
    print(f"{len(names)} kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])
