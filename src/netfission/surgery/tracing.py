"""Trace a model into a graph, and find which tensors are live at each point of the graph.

A model is first traced symbolically, which works for every size of images. If its forward pass branches on
shapes, it is traced with the shapes of two batches of the example images: sizes that both share are
constants, and sizes that differ (the batch) stay symbolic.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from netfission.utils.inputs import Inputs, cloned, map_inputs, row_count, tensors_in
from netfission.utils.modes import in_mode

_VIEWS = {"contiguous", "flatten", "permute", "reshape", "transpose", "view"}  # methods that change no value

MAIN_OUTPUT = "out"  # the key of the logits in what torchvision's segmentation networks return
_SPATIAL = {2, 3, -1, -2}  # dimensions of images that are their height and width
_KINDS = {"device", "dtype", "is_cuda", "is_nested", "is_quantized", "is_sparse", "layout"}  # of a tensor


class Mode(int):
    """The attribute `training` of a module while it is traced: false, and recognised in the graph."""


class ReadMode(nn.Module):
    """A module that returns its own mode, so that a graph can pass it on to functions.

    Example:
        >>> ReadMode().eval()()
        False
    """

    def forward(self) -> bool:
        """Return whether the module is in train mode."""
        return self.training


class ModuleTracer(fx.Tracer):
    """A tracer that stops at some modules, and stores where each module starts and ends.

    With `ends`, it traces into modules that contain one of these, and into no others. Without, it traces
    into every module with two exceptions. Modules that own parameters or buffers beside children are not
    traced, since the trace would freeze their mode (timm's `BatchNormAct2d`); with `into_owners` they are, as
    encoders may own the embeddings of their positions. Modules that cannot be traced, such as those whose
    forward pass depends on the data, stay whole.
    """

    def __init__(self, ends: Sequence[str] | None = None, *, into_owners: bool = False) -> None:
        super().__init__()
        self._into_owners = into_owners
        self._inside = ends and {name[:dot] for name in ends for dot in range(len(name)) if name[dot] == "."}
        self.before: dict[str, fx.Node] = {}  # module name → the last node before it starts
        self.last: dict[str, fx.Node] = {}  # module name → the node it returns, the last of several
        self.returned: dict[str, set[fx.Node]] = {}  # module name → all nodes it returns
        self.called_again: set[str] = set()  # modules that run more than once
        self.frame: fx.Node | None = None  # the images without channels, if their size is read
        self.aside: set[fx.Node] = set()  # what is computed of several inputs without parameters, as masks

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a model; see `fx.Tracer.trace`."""
        self._context = _context()
        return super().trace(root, concrete_args)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node to the graph.

        Raises:
            TraceError: the model's code is within `torch.no_grad()`, `torch.autocast()` or the like. A graph
                has operations alone, so the context would be lost.
        """
        if kind.startswith("call_") and self._context != (context := _context()):
            (name,) = [name for name in context if context[name] != self._context[name]][:1]
            raise fx.proxy.TraceError(f"its code sets {name} for a part of the forward pass")
        return super().create_node(kind, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole."""
        if self._inside is not None:
            return module_qualified_name not in self._inside
        tensors = [*m._parameters.values(), *m._buffers.values()]
        if not any(True for _ in m.children()):
            return True
        return not self._into_owners and any(tensor is not None for tensor in tensors)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, and remember where it starts and which node it returns."""
        try:
            name = self.path_of_module(m)
        except NameError:  # made by the model's code, as in `nn.ReLU()(features)`
            if any(True for _ in (*m.parameters(), *m.buffers())):
                raise
            return forward(*args, **kwargs)
        before = next(iter(reversed(self.graph.nodes)))
        enclosing = self.module_stack.copy()
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # a user's module may raise anything while it is traced
            if self._inside is not None:
                raise
            self.module_stack = enclosing  # which fx leaves as it is where a module fails
            for node in reversed(self.graph.nodes):  # erase what was traced of it, and keep it whole
                if node is before:
                    break
                self.graph.erase_node(node)
            for inner in [inner for inner in self.last if inner.startswith(f"{name}.")]:
                del self.before[inner], self.last[inner], self.returned[inner]
            result = self.create_proxy("call_module", name, args, kwargs)
        if name in self.last:
            self.called_again.add(name)
        returned = _nodes_in(result)
        if returned and _nodes_in((args, kwargs)):
            self.before[name] = before
            self.returned[name] = returned
            self.last[name] = next(node for node in reversed(self.graph.nodes) if node in returned)
        return result


def _context() -> dict[str, object]:
    """Return what `with` blocks around operations set, by the name of the block.

    A block that sets what is set already, such as `autocast(enabled=False)`, leaves no mark.
    """
    devices = ("cpu", torch.accelerator.current_accelerator() or torch.device("cpu"))
    return {
        "torch.no_grad()": torch.is_grad_enabled(),
        "torch.autocast()": [torch.is_autocast_enabled(torch.device(device).type) for device in devices],
    }


def _nodes_in(values: Any) -> set[fx.Node]:
    """Return the nodes of the proxies in a nested structure."""
    found: set[fx.Node] = set()
    map_aggregate(values, lambda part: found.add(part.node) if isinstance(part, fx.Proxy) else None)
    return found


class ShapeTracer(ModuleTracer):
    """A tracer that knows each value for two batches of different size, so that a model may branch on shapes.

    Args:
        batches: two batches of images of one size; the second has more images.
        ends: see `ModuleTracer`.
        into_owners: see `ModuleTracer`.
    """

    def __init__(
        self, batches: tuple[Inputs, Inputs], ends: Sequence[str] | None = None, *, into_owners: bool = False
    ) -> None:
        super().__init__(ends, into_owners=into_owners)
        self._batches = batches
        self._running = False  # a module computes values, and must not be traced
        self._stand_ins: Counter[fx.Node] = Counter()  # how many there are of a node's value
        # Of tensors that are not read again, the shapes alone.
        self.values: dict[fx.Node, tuple[Any, Any]] = {}

    def keep_shapes(self) -> None:
        """Free the memory of all tensors; their shapes stay known."""
        self.values = {node: _without_data(values) for node, values in self.values.items()}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the stand-in for a node's value."""
        self._stand_ins[node] += 1
        return _ShapedProxy(node, self)

    def forget(self, node: fx.Node) -> None:
        """Free the memory of a node's tensors if no stand-in is left that a model's code could read."""
        self._stand_ins[node] -= 1
        if not self._stand_ins[node] and node in self.values:
            self.values[node] = _without_data(self.values[node])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute of a module: a proxy of a parameter, unless a module computes values."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """See `ModuleTracer.call_module`."""
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return a truth value that does not depend on the images."""
        values = self.values.get(obj.node, ()) if isinstance(obj.node, fx.Node) else ()
        if not values or any(isinstance(value, Tensor) for value in values):
            raise fx.proxy.TraceError("control flow depends on the images")
        first, second = map(bool, values)
        if first != second:
            raise fx.proxy.TraceError("control flow depends on the size of the batch")
        return first

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Create a node, compute its values, and return what stands for them."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "placeholder":
            if len(self.graph.nodes) == 1:
                self.values[node] = self._batches
            return proxy
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in self.values:  # a constant of the model's code
                self.values[source] = self._run(source, 0), self._run(source, 1)
        if kind == "output" or not all(source in self.values for source in node.all_input_nodes):
            return proxy
        if kind == "call_method" and target in ("item", "tolist"):
            raise fx.proxy.TraceError("control flow depends on the images")
        self.values[node] = self._run(node, 0), self._run(node, 1)
        return _stand_in(proxy, *self.values[node])

    def _run(self, node: fx.Node, batch: int) -> Any:
        """Compute a node's value for one of the batches."""
        args, kwargs = self._known((node.args, dict(node.kwargs)), batch)
        self._running = True
        try:
            with torch.no_grad():
                if node.op == "get_attr":
                    return operator.attrgetter(str(node.target))(self.root)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                module = self.root.get_submodule(str(node.target))
                with in_mode(module, training=False):
                    return module(*args, **kwargs)
        finally:
            self._running = False

    def _known(self, part: Any, batch: int) -> Any:
        """Return an argument of a node with the values of nodes, in lists that the model may change."""
        match part:
            case fx.Node():
                return self.values[part][batch]
            case Mode():
                return bool(part)
            case list():
                return [self._known(item, batch) for item in part]
            case tuple():
                items = [self._known(item, batch) for item in part]
                return type(part)(*items) if hasattr(part, "_fields") else tuple(items)
            case dict():
                return {key: self._known(item, batch) for key, item in part.items()}
            case slice():
                return slice(*(self._known(end, batch) for end in (part.start, part.stop, part.step)))
        return part


@dataclass(frozen=True)
class _Shape:
    """What is left of a tensor that is not read again."""

    sizes: tuple[int, ...]


def _without_data(values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: _Shape(tuple(tensor.shape)), values)


class _ShapedProxy(fx.Proxy):
    """A proxy whose tensor has a shape: integers, and proxies of the sizes that depend on the batch."""

    def __del__(self) -> None:
        self.tracer.forget(self.node)  # type: ignore[attr-defined]

    @property
    def _values(self) -> tuple[Any, Any]:
        return self.tracer.values[self.node]  # type: ignore[attr-defined,no-any-return]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes of all dimensions."""
        return tuple(self.size(dim) for dim in range(self.ndim))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return int(self._values[0].ndim)

    def size(self, dim: int | None = None) -> Any:
        """Return the size of a dimension, or of all."""
        if dim is None:
            return self.shape
        first, second = (value.shape[dim] for value in self._values)
        return first if first == second else self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])  # type: ignore[index]

    def __len__(self) -> int:
        first, second = map(len, self._values)
        if first != second:
            raise fx.proxy.TraceError("control flow depends on the size of the batch")
        return first

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._values[0], name)
        return value if name in _KINDS else super().__getattr__(name)


def _stand_in(proxy: fx.Proxy, first: Any, second: Any) -> Any:
    """Return what a model's code reads in place of a value: tensors and sizes of batches stay symbolic."""
    if isinstance(first, list | tuple) and not isinstance(first, torch.Size):
        parts = [_part_of(proxy, index, first[index], second[index]) for index in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, dict):
        return {key: _part_of(proxy, key, first[key], second[key]) for key in first}
    return proxy if isinstance(first, Tensor) or first != second else first


def _part_of(proxy: fx.Proxy, key: Any, first: Any, second: Any) -> Any:
    """Return what stands for one element of a value."""
    same = not isinstance(first, Tensor | list | tuple | dict) and first == second
    return first if same else proxy[key]  # type: ignore[index]


@contextmanager
def _symbolic_mode(root: nn.Module, tracer: ModuleTracer) -> Iterator[None]:
    """Trace in eval mode, and let the modules traced into have a `Mode`."""
    with in_mode(root, training=False):
        for name, module in root.named_modules():
            if not name or not tracer.is_leaf_module(module, name):
                module.training = Mode(0)
        yield


def trace(root: nn.Module, tracer: ModuleTracer, *, of_images: bool = True) -> fx.Graph:
    """Trace `root` in eval mode as a function of its first argument; other arguments keep their defaults.

    Where the model's code passes its own mode on to a function, as in `F.dropout(x, p, self.training)`, the
    graph calls a module that returns its mode.

    Raises:
        Exception: whatever the model's code raises while it is traced.
    """
    parameters = list(inspect.signature(root.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    with _symbolic_mode(root, tracer):
        graph = tracer.trace(root, concrete_args=defaults or None)
    images, *rest = [node for node in graph.nodes if node.op == "placeholder"]
    # Arguments left at their defaults, fx's assertions that they are, and constants that the code knows.
    for node in rest:
        _erase(tracer, graph, node)
    # Parts of results and views that nothing reads, such as hidden states that a model returns beside logits.
    for node in reversed(graph.nodes):
        is_view = node.op == "call_method" and node.target in _VIEWS
        if not node.users and (is_view or node.target is operator.getitem):
            _erase(tracer, graph, node)
    _keep_main_output(tracer, graph)
    tracer.frame = _separate_frame(graph, images) if of_images else None
    _read_mode(root, graph, images)
    return graph


def _keep_main_output(tracer: ModuleTracer, graph: fx.Graph) -> None:
    """Leave out the outputs of auxiliary heads, in a dictionary beside the logits, and what computes them."""
    output = graph.output_node()
    outputs = output.args[0]
    if not isinstance(outputs, dict) or not isinstance(outputs.get(MAIN_OUTPUT), fx.Node):
        return
    unused = [node for node in output.all_input_nodes if node is not outputs[MAIN_OUTPUT]]
    output.args = (outputs[MAIN_OUTPUT],)
    while unused:
        node = unused.pop()
        if not node.users and node.op != "placeholder":
            unused += node.all_input_nodes
            _erase(tracer, graph, node)


def _separate_frame(graph: fx.Graph, images: fx.Node) -> fx.Node | None:
    """Read height and width of the images from a tensor without channels, which parts can pass on for free.

    A dense network scales its maps to the size of the images at its end.

    Returns:
        That tensor, `(batch, 0, height, width)`; None if nothing reads the size.
    """
    readers = [node for node in images.users if _reads_size(node)]
    if not readers:
        return None
    with graph.inserting_after(images):
        frame: fx.Node = graph.call_function(operator.getitem, (images, (slice(None), slice(0, 0))))
    for node in readers:
        node.replace_input_with(images, frame)
    for node in reversed(_sizes(graph, readers)):  # each part reads the size itself
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.node_copy(node))
        for user in node.users:
            user.prepend(node)
    return frame


def _sizes(graph: fx.Graph, readers: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes that compute integers from the size of the images, in the order they run."""
    found = dict.fromkeys(readers)
    for node in graph.nodes:
        sources = node.all_input_nodes
        if getattr(node.target, "__module__", "") == "_operator" and sources and found.keys() >= {*sources}:
            found[node] = None
    return list(found)


def _reads_size(node: fx.Node) -> bool:
    """Return whether a node reads nothing of its tensor but the height or width."""
    is_shape = node.target is getattr and node.args[1] == "shape"
    if node.op == "call_method" and node.target == "size":
        if node.args[1:]:
            return _is_spatial(node.args[1])
        is_shape = not node.kwargs
    return bool(is_shape) and all(
        user.target is operator.getitem and _is_spatial(user.args[1]) for user in node.users
    )


def _is_spatial(index: Any) -> bool:
    first = index.start if isinstance(index, slice) else index
    return first in _SPATIAL


def _erase(tracer: ModuleTracer, graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(tracer, graph, user)
    for name, before in tracer.before.items():
        if before is node:
            tracer.before[name] = node.prev
    for name, returned in tracer.returned.items():
        if node in returned and len(returned) > 1:
            returned.remove(node)
            tracer.last[name] = next(other for other in reversed(graph.nodes) if other in returned)
    graph.erase_node(node)


def _read_mode(root: nn.Module, graph: fx.Graph, images: fx.Node) -> None:
    """Replace the mode of the trace by the mode of a module in the graph."""
    readers = [node for node in graph.nodes if _holds_mode((node.args, node.kwargs))]
    if not readers:
        return
    with graph.inserting_after(images):
        root.add_module("read_mode", ReadMode().train(root.training))
        mode = graph.call_module("read_mode")
    for node in readers:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda part: mode if isinstance(part, Mode) else part
        )


def _holds_mode(arguments: Any) -> bool:
    found: list[bool] = []
    map_aggregate(arguments, lambda part: found.append(isinstance(part, Mode)))
    return any(found)


def constants(root: nn.Module, graph: fx.Graph, tracer: ModuleTracer) -> set[fx.Node]:
    """Return the nodes that every part can compute again: from no images, and from no parameters.

    The number of images is one of them, since each part reads it from its features.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if is_batch_size(node, tracer):
            found.add(node)
        elif node.op not in ("placeholder", "output") and all(
            source in found or _is_constant(root, source) for source in node.all_input_nodes
        ):
            module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is None or not any(True for _ in module.parameters()):
                found.add(node)
    return found


def _is_constant(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node fetches something else than a parameter."""
    return node.op == "get_attr" and not isinstance(operator.attrgetter(str(node.target))(root), nn.Parameter)


def is_batch_size(node: fx.Node, tracer: ModuleTracer) -> bool:
    """Return whether a node is the number of images."""
    if not isinstance(tracer, ShapeTracer) or node.op != "call_method" or node.target != "size":
        return False
    return tracer.values.get(node) == tuple(row_count(batch) for batch in tracer._batches)


def rows_per_image(node: fx.Node, tracer: ModuleTracer) -> int:
    """Return how many rows of a node's tensor belong to one image, such as windows; 1 if it is not known."""
    if not isinstance(tracer, ShapeTracer):
        return 1
    values = tracer.values.get(node, ())
    counts = {
        value.sizes[0] / row_count(batch)
        for value, batch in zip(values, tracer._batches, strict=False)
        if isinstance(value, _Shape) and value.sizes
    }
    (rows,) = counts if len(counts) == 1 else (1,)
    return int(rows) if rows > 1 and rows == int(rows) else 1


def shapes(
    root: nn.Module, tracer: ModuleTracer, graph: fx.Graph, images: Inputs
) -> dict[fx.Node, tuple[int, ...]]:
    """Return the shape of each node's tensor in eval mode, for these images."""
    if isinstance(tracer, ShapeTracer):
        return {node: first.sizes for node, (first, _) in tracer.values.items() if isinstance(first, _Shape)}
    with torch.no_grad(), in_mode(root, training=False):
        run = _Shapes(root, graph)
        run.run(cloned(images))
    return run.sizes


class _Shapes(fx.Interpreter):
    """Runs a graph and notes shapes, as `ShapeProp` of PyTorch does, whose import takes half a second.

    Attributes:
        sizes: node → the shape of its tensor.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.sizes[n] = tuple(result.shape)
        return result


def live_after(graph: fx.Graph, free: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return each node → the nodes up to it whose values later nodes read.

    Parameters and the `free` nodes are not counted as live; each part fetches or computes them again.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    live: list[fx.Node] = []
    for node in graph.nodes:
        if node.op not in ("get_attr", "output") and node not in free:
            live.append(node)
        live = [n for n in live if last_use[n] > order[node]]
        found[node] = tuple(live)
    return found


def start_of(tracer: ModuleTracer, root: nn.Module, name: str) -> fx.Node:
    """Return the last node before the first stage: before the module that ends the stage.

    If that module is one of several siblings of its type, it is the node before the first sibling:
    `blocks.3` of twelve equal blocks ends a stage that starts with `blocks.0`.
    """
    parent, _, _ = name.rpartition(".")
    kind = type(root.get_submodule(name))
    order = {node: index for index, node in enumerate(tracer.graph.nodes)}  # decoders run the last one first
    if not parent and kind is nn.Sequential:  # stages, or a stem, of whatever layers
        return _before(tracer, name, order)
    children = root.get_submodule(parent).named_children()
    siblings = [f"{parent}.{child}".lstrip(".") for child, module in children if type(module) is kind]
    ran = [_before(tracer, sibling, order) for sibling in siblings if sibling in tracer.before]
    return min(ran, key=order.__getitem__, default=_before(tracer, name, order))


def _before(tracer: ModuleTracer, name: str, order: Mapping[fx.Node, int]) -> fx.Node:
    """Return the last node before a module.

    The one that was traced there may be of a size, which has been moved to where it is used.
    """
    before, last = tracer.before[name], tracer.last.get(name)
    if last is None or last not in order or order[before] < order[last]:
        return before
    inside = [node for node in order if node.op == "call_module" and f"{node.target}.".startswith(f"{name}.")]
    return min(inside, key=order.__getitem__, default=last).prev


Attempt = Callable[[], tuple[ModuleTracer, fx.Graph]]


def attempts(root: nn.Module, example_input: Inputs, ends: Sequence[str] | None = None) -> Iterator[Attempt]:
    """Yield the ways to trace a model, each as a function that does it; the simplest first."""

    def attempt(tracer: ModuleTracer) -> tuple[ModuleTracer, fx.Graph]:
        graph = trace(root, tracer, of_images=_has_positions(example_input))
        if not isinstance(example_input, Tensor):
            tracer.aside = _without_parameters(root, graph)
        if isinstance(tracer, ShapeTracer):
            tracer.keep_shapes()
        return tracer, graph

    def attempt_with_shapes(pair: tuple[Inputs, Inputs], into_owners: bool) -> tuple[ModuleTracer, fx.Graph]:
        return attempt(ShapeTracer(pair, None if into_owners else ends, into_owners=into_owners))

    yield lambda: attempt(ModuleTracer(ends))
    pairs = [(example_input, map_inputs(_with_a_row, example_input))]
    if _has_codes(example_input):  # of tokens; sentences of any length are better than of one
        pairs.insert(0, (example_input, map_inputs(_longer, pairs[0][1])))
    for pair in pairs:
        yield partial(attempt_with_shapes, pair, False)
        if ends is None:
            yield partial(attempt_with_shapes, pair, True)


def _without_parameters(root: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are computed from the inputs and from sizes, and from no parameters."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        is_size = node.op == "call_method" and node.target == "size"
        known = is_size or all(source in found or _is_constant(root, source) for source in sources)
        has_parameters = node.op == "call_module" and any(
            True for _ in root.get_submodule(str(node.target)).parameters()
        )
        if node.op == "placeholder" or (sources and known and not has_parameters and node.op != "output"):
            found.add(node)
    return found


def _has_positions(inputs: Inputs) -> bool:
    return isinstance(inputs, Tensor) and inputs.ndim > 2


def _has_codes(inputs: Inputs) -> bool:
    """Return whether inputs are sequences, such as the numbers of tokens."""
    return all(tensor.ndim == 2 for tensor in tensors_in(inputs)) and any(
        tensor.dtype in (torch.int32, torch.int64) for tensor in tensors_in(inputs)
    )


def _with_a_row(tensor: Tensor) -> Tensor:
    first = tensor[:1]
    return torch.cat([tensor, first.flip(-2) if tensor.ndim > 1 else first])


def _longer(tensor: Tensor) -> Tensor:
    """Return sequences that are longer by two, which is not what one row more adds."""
    return torch.cat([tensor, tensor[:, :1], tensor[:, :1]], dim=1)
