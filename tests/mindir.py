"""Reads a graph that ms.export wrote, and says what each way through it would run."""

from collections import Counter
from dataclasses import dataclass
from typing import Tuple

from mindspore.train import mind_ir_pb2

BFLOAT16 = mind_ir_pb2.TensorProto.BFLOAT16
FLOAT64 = (mind_ir_pb2.TensorProto.DOUBLE, mind_ir_pb2.TensorProto.FLOAT64)
_PASSED_ON = ("Load", "Depend", "UpdateState")


@dataclass(frozen=True)
class Closure:
    """A graph with its first arguments."""

    graph: str
    arguments: Tuple


@dataclass(frozen=True)
class Choice:
    """What a Switch gives: one of two closures."""

    branches: Tuple


class MindIR:
    """A .mindir file.

    Attributes:
        operators: a Counter of every operator in the file, however often it would run.
        tensors: (dtype, dims) of everything that an operator gives, or a graph takes; dims below 0 are dynamic.
        loops: names of the graphs that call themselves, in the end.
    """

    def __init__(self, file):
        model = mind_ir_pb2.ModelProto()
        model.ParseFromString(file.read_bytes())
        self.main = model.graph.name
        self.graphs = {graph.name: graph for graph in (model.graph, *model.functions)}
        self.operators, self.tensors, self.loops = Counter(), set(), set()
        for graph in self.graphs.values():
            for value in graph.input:
                self.tensors.update(map(_kind, value.tensor))
            for node in graph.node:
                self.operators[_operator(node)] += 1
                for attribute in node.attribute:
                    if attribute.name == "shape":
                        self.tensors.update(_tensors(attribute))

        self._paths = self._run(self.main, (), self._parameters(model.graph), ())

    def paths(self):
        """Every way through the graph, a Counter each: (operator, Parameter or None) to how often it runs.

        A loop is followed through one turn, and past it without one. A Parameter is named with each operator that it
        goes into; an operator with none, or several of no name, counts under None.
        """
        return self._paths

    def handed(self, part):
        """The names of what graphs with this in their own names are given, Parameters by theirs."""
        graphs = [graph for graph in self.graphs.values() if part in graph.name]
        return {value.name.rpartition(":")[2] for graph in graphs for value in graph.input}

    def _parameters(self, graph):
        """A graph's Parameters by their own names, "transformer_blocks.0.attn.to_q.weight"."""
        return {value.name: value.name.partition(":")[2] for value in graph.parameter}

    def _run(self, name, arguments, known, running):
        graph = self.graphs[name]
        values = {**known, **{place.name: given for place, given in zip(graph.input, arguments)}}
        paths = [Counter()]
        for node in graph.node:
            operator = _operator(node)
            inputs = [values.get(each, Closure(each, ()) if each in self.graphs else None) for each in node.input]
            result = None
            if operator == "Partial":
                result = Closure(inputs[0].graph, (*inputs[0].arguments, *inputs[1:]))
            elif operator == "Switch":
                result = Choice(tuple(inputs[1:3]))
            elif operator in _PASSED_ON:
                result = inputs[0]
            elif operator in self.graphs or isinstance(values.get(operator), (Closure, Choice)):
                called = values.get(operator, Closure(operator, ()))
                ways = []
                for closure in called.branches if isinstance(called, Choice) else (called,):
                    if closure.graph in (*running, name):
                        self.loops.add(closure.graph)
                        ways.append(Counter())
                    else:
                        ways += self._run(closure.graph, (*closure.arguments, *inputs), known, (*running, name))
                paths = [path + way for path in paths for way in _different(ways)]
            else:
                used = [(operator, value) for value in inputs if isinstance(value, str)] or [(operator, None)]
                for path in paths:
                    path.update(used)
            for output in node.output:
                values[output] = result
        return _different(paths)


def _operator(node):
    """An operator's name, or the graph or the value that a node calls."""
    name = node.op_type.removeprefix("REF::")
    head, _, number = name.rpartition(":")
    return head if number.isdigit() and "construct" not in head and ":" not in head else name


def _different(paths):
    """The paths, each once."""
    return list({frozenset(path.items()): path for path in paths}.values())


def _kind(tensor):
    return tensor.data_type, tuple(tensor.dims)


def _tensors(attribute):
    """(dtype, dims) of the tensors in an attribute, tuples within tuples included."""
    for tensor in attribute.tensors:
        yield _kind(tensor)
    for value in attribute.values:
        yield from _tensors(value)
