"""Rewrites a frozen network, traced by torch.fx or module by module, into the layers of fd2fast.models.frozen_layers.

Traced, a network becomes a graph in which each BN with the addition and the activation after it is one call that also gives
its matching loss. A module whose forward cannot be traced stays as it is, with its layers replaced one by one.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from fd2fast.errors import UserError
from fd2fast.models.backbone import Backbone
from fd2fast.models.frozen_layers import (
    FrozenAvgPool,
    FrozenBatchNorm,
    FrozenConv,
    FrozenJoin,
    FrozenMaxPool,
    Segments,
    map_statistics,
)
from fd2fast.ops import _dispatch
from fd2fast.ops._segments import distance
from fd2fast.reference._offsets import accumulation_dtype

log = logging.getLogger("fd2fast")

_INERT = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Modules, functions and methods that keep no activation for their backward when their own tensors are frozen.
_LEAN_MODULES = (
    nn.Flatten,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Linear,
)
_LEAN_FUNCTIONS = {
    *_ADDITIONS,
    operator.getitem,
    operator.floordiv,
    operator.mul,
    operator.sub,
    getattr,
    torch.cat,
    torch.flatten,
    torch.chunk,
    torch.split,
    torch.transpose,
    torch.mean,
    torch.stack,
    F.pad,
    F.linear,
    F.interpolate,
}
_LEAN_METHODS = {
    "add",
    "chunk",
    "contiguous",
    "dim",
    "flatten",
    "mean",
    "permute",
    "repeat",
    "reshape",
    "size",
    "split",
    "sum",
    "transpose",
    "unsqueeze",
    "squeeze",
    "view",
}


class Recorder:
    """Where layers inside untraced modules put their losses: (index of the BN layer, loss [S])."""

    def __init__(self) -> None:
        self.segments: Segments = ()
        self.losses: list[tuple[int, Tensor]] = []

    def start(self, segments: Segments) -> None:
        self.segments, self.losses = segments, []


class _Linear(nn.Module):
    """A frozen Linear in the accumulation type."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        wide = accumulation_dtype(dtype)
        self.register_buffer("weight", layer.weight.detach().to(wide), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().to(wide)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class _Activation(nn.Module):
    """ReLU or ReLU6 apart from any BN."""

    def __init__(self, activation: str):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _dispatch.run("activation", "auto", x, self.activation)
        return y


class _OddBatchNorm(nn.Module):
    """A BatchNorm2d subclass with a forward of its own: called as it is, its input's statistics measured beside."""

    def __init__(self, layer: nn.BatchNorm2d, index: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.index = _cast(layer, accumulation_dtype(dtype)), index

    def forward(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        mean, var = map_statistics(x, segments).unbind()
        known, layer = mean.dtype, self.layer
        loss = distance(mean, var, layer.running_mean.to(known), layer.running_var.to(known), segments)
        return layer(x.to(known)).to(x.dtype), loss


class _Recording(nn.Module):
    """A rewritten BN inside an untraced module: gives y alone and hands its loss to the recorder."""

    def __init__(self, layer: FrozenBatchNorm | _OddBatchNorm, recorder: Recorder):
        super().__init__()
        self.layer, self.recorder = layer, recorder

    def forward(self, x: Tensor) -> Tensor:
        y, loss = self.layer(x, self.recorder.segments)
        self.recorder.losses.append((self.layer.index, loss))
        return y


def activation_of(module: nn.Module | None) -> str | None:
    """The name of an activation module in fd2fast.models.frozen_layers, or None if it is another."""
    if module is None or type(module) is nn.Identity:
        return "identity"
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.ReLU6 or (type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0)):
        return "relu6"
    return None


def _cast(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a module with its own floating tensors in `dtype`, out of place where it could work in place."""
    found = copy.deepcopy(module).to(dtype).requires_grad_(False)
    for part in found.modules():
        if getattr(part, "inplace", False) is True:
            setattr(part, "inplace", False)  # noqa: B010 (nn.Module types attributes as tensors)
    return found


def _plain_batch_norm(layer: nn.Module) -> bool:
    return type(layer) is nn.BatchNorm2d or type(layer) is BatchNormAct2d


class _Layers:
    """Makes the frozen counterpart of single modules."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype):
        self.dtype = dtype
        self.index = {id(layer): i for i, (_, layer) in enumerate(backbone.bn_layers())}
        for name, layer in backbone.bn_layers():
            if layer.running_mean is None or layer.running_var is None:
                raise UserError(
                    f"model {backbone.name!r}: BN layer {name} keeps no statistics (track_running_stats=False); "
                    "there is nothing to match"
                )

    def batch_norm(self, layer: nn.BatchNorm2d, activation: str) -> FrozenBatchNorm:
        return FrozenBatchNorm(layer, activation, self.index[id(layer)], self.dtype)

    def join(self, layer: nn.BatchNorm2d, activation: str) -> FrozenJoin:
        return FrozenJoin(layer, activation, self.index[id(layer)], self.dtype)

    def odd_batch_norm(self, layer: nn.BatchNorm2d) -> _OddBatchNorm:
        return _OddBatchNorm(layer, self.index[id(layer)], self.dtype)

    def simple(self, layer: nn.Module) -> nn.Module | None:
        """The counterpart of a convolution, pooling, activation or linear layer; None for anything else."""
        if type(layer) is nn.Conv2d or type(layer) is Conv2dSame:
            same = type(layer) is Conv2dSame
            if layer.padding_mode != "zeros":
                return None
            try:
                return FrozenConv(layer, self.dtype, same=same)
            except ValueError:
                return None
        if type(layer) is nn.MaxPool2d or type(layer) is MaxPool2dSame:
            if layer.return_indices or layer.kernel_size == () or _area(layer.kernel_size) > 256:
                return None
            return FrozenMaxPool(layer, same=type(layer) is MaxPool2dSame)
        if type(layer) is nn.AvgPool2d:
            return FrozenAvgPool(layer)
        if type(layer) is nn.Linear:
            return _Linear(layer, self.dtype)
        name = activation_of(layer)
        return _Activation(name) if name in ("relu", "relu6") else None

    def replaced(self, module: nn.Module, recorder: Recorder, fallbacks: list[str], path: str) -> nn.Module:
        """A copy of a module that cannot be traced, its layers replaced one by one; its own code runs unchanged."""
        if isinstance(module, nn.BatchNorm2d):
            if not _plain_batch_norm(module):
                fallbacks.append(f"{path} ({type(module).__name__})")
                return _Recording(self.odd_batch_norm(module), recorder)
            after = getattr(module, "act", None)
            name = activation_of(after)
            fused = _Recording(self.batch_norm(module, name or "identity"), recorder)
            return fused if name is not None else nn.Sequential(fused, _cast(after, self.dtype))  # type: ignore[arg-type]
        simple = self.simple(module)
        if simple is not None:
            return simple
        twin = copy.copy(module)
        twin._modules = {
            k: None if m is None else self.replaced(m, recorder, fallbacks, f"{path}.{k}")
            for k, m in module._modules.items()
        }
        for kind in ("_parameters", "_buffers"):
            own = {k: _converted(v, self.dtype) for k, v in getattr(module, kind).items()}
            setattr(twin, kind, own)
        return twin


def _converted(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    value = value.detach()
    return value.to(dtype) if value.is_floating_point() else value


def _area(kernel: Any) -> int:
    return kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[-1]


class _Halves(nn.Module):
    """The backbone as one function: x -> (features, logits)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.features(x)
        return features, self.backbone.logits(features)


class _Untraceable(Exception):  # noqa: N818 (control flow)
    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class _Tracer(fx.Tracer):
    """Traces through everything but layers, and through no module named in `opaque`."""

    def __init__(self, opaque: set[str]):
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque:
            return True
        kinds = (nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, DropPath)
        return isinstance(m, kinds) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:  # a model's own code may raise anything when it is given proxies
            reason = str(error).strip().splitlines()
            raise _Untraceable(self.path_of_module(m), reason[0] if reason else type(error).__name__) from error


def _traced(backbone: Backbone) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of (features, logits), and the modules left whole with the reason. Raises if the outermost code fails."""
    halves, opaque = _Halves(backbone), dict[str, str]()
    while True:
        tracer = _Tracer(set(opaque))
        try:
            graph = tracer.trace(halves)
        except _Untraceable as found:
            if found.path in opaque:
                raise
            opaque[found.path] = found.reason
            continue
        return fx.GraphModule(tracer.root, graph), opaque


class Rewritten(nn.Module):
    """A rewritten backbone: forward(x, segments) -> (features, logits, [(BN index, loss [S])])."""

    def __init__(self, body: nn.Module, recorder: Recorder, fallbacks: list[str], traced: bool):
        super().__init__()
        self.body, self.recorder, self.fallbacks, self.traced = body, recorder, fallbacks, traced

    def forward(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, list[tuple[int, Tensor]]]:
        """x: [N, 3, H, W] in the type it was made for; segments: host row offsets."""
        self.recorder.start(segments)
        if self.traced:
            features, logits, losses = self.body(x, segments)
        else:
            features, logits = self.body(x)
            losses = []
        return features, logits, [*losses, *self.recorder.losses]


def by_modules(backbone: Backbone, dtype: torch.dtype, reason: str) -> Rewritten:
    """The backbone with its layers replaced one by one, its own code unchanged."""
    recorder, fallbacks = Recorder(), [f"the whole network: {reason}"]
    layers = _Layers(backbone, dtype)
    twin = copy.copy(backbone)
    twin._modules = {"net": layers.replaced(backbone.net, recorder, fallbacks, "net")}
    return Rewritten(_Halves(twin), recorder, fallbacks, traced=False)


def by_graph(backbone: Backbone, dtype: torch.dtype, probe: Tensor) -> Rewritten:
    """The backbone traced and fused. Raises whatever tracing raises where the outermost code cannot be traced.

    probe: an image batch [n, 3, H, W] that the backbone can see, for the shapes of its maps.
    """
    graph_module, opaque = _traced(backbone)
    with torch.no_grad():
        ShapeProp(graph_module).propagate(probe)
    return _Fusion(backbone, graph_module, opaque, dtype).result()


def rewrite(backbone: Backbone, dtype: torch.dtype, probe: Tensor) -> Rewritten:
    """`by_graph`, or `by_modules` where that is not possible (logged).

    dtype: the type of the maps; BN arithmetic and the last linear layer are in fp32 (fp64 for fp64). Weights are copied.
    Raises UserError for a BN layer without statistics.
    """
    try:
        return by_graph(backbone, dtype, probe)
    except UserError:
        raise
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        told = str(error).strip().splitlines()
        reason = f"torch.fx cannot trace it ({told[0] if told else type(error).__name__})"
        log.warning("%s is rewritten module by module: %s", backbone.name, reason)
        return by_modules(backbone, dtype, reason)


class _Fusion:
    """The passes over one traced graph."""

    def __init__(self, backbone: Backbone, source: fx.GraphModule, opaque: dict[str, str], dtype: torch.dtype):
        self.source, self.graph, self.opaque, self.dtype = source, source.graph, opaque, dtype
        self.backbone = backbone
        self.layers = _Layers(backbone, dtype)
        self.recorder = Recorder()
        self.fallbacks: list[str] = []
        self.parts = nn.Module()
        self.losses: list[tuple[int, fx.Node]] = []
        self.count = 0

    def result(self) -> Rewritten:
        for path, reason in self.opaque.items():
            self.fallbacks.append(f"{_stock(path)} ({self._type(path)}): torch.fx cannot trace it ({reason})")
        self._drop_inert()
        self._functionalise()
        (x,) = (node for node in self.graph.nodes if node.op == "placeholder")
        with self.graph.inserting_after(x):
            self.segments = self.graph.placeholder("segments")
        self._fuse_batch_norms()
        self._replace_rest()
        output = next(node for node in self.graph.nodes if node.op == "output")
        features, logits = output.args[0]
        output.args = ((features, logits, self.losses),)
        body = fx.GraphModule(self.parts, self.graph)
        body.graph.eliminate_dead_code()
        body.graph.lint()
        body.recompile()
        return Rewritten(body, self.recorder, self.fallbacks, traced=True)

    def _module(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module" and not node.meta.get("done"):
            return self.source.get_submodule(str(node.target))
        return None

    def _type(self, path: str) -> str:
        return type(self.source.get_submodule(path)).__name__

    def _nodes(self) -> Iterator[fx.Node]:
        yield from list(self.graph.nodes)

    def _add_part(self, module: nn.Module, near: fx.Node) -> str:
        """Registers a layer under the stock path, made unique, and returns its name."""
        stem = _stock(str(near.target)).replace(".", "_") if near.op == "call_module" else near.name
        name = stem if not hasattr(self.parts, stem) else f"{stem}_{self.count}"
        self.count += 1
        self.parts.add_module(name, module)
        return name

    def _drop_inert(self) -> None:
        """Take out what does nothing in eval mode."""
        for node in self._nodes():
            module = self._module(node)
            dropout = node.op == "call_function" and node.target in (F.dropout, F.dropout2d)
            if isinstance(module, _INERT) or (dropout and not node.kwargs.get("training", False)):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)

    def _functionalise(self) -> None:
        """Later readers of a tensor that a node changes in place read the node instead; then nothing works in place."""
        for node in self._nodes():
            module = self._module(node)
            changes = getattr(module, "inplace", False) is True or node.kwargs.get("inplace", False) is True
            if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
                node.target, changes = str(node.target)[:-1], True
            if node.op == "call_function" and node.target is operator.iadd:
                node.target, changes = operator.add, True
            if node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_"):
                raise NotImplementedError(f"{node.target} works in place")
            if isinstance(module, BatchNormAct2d):  # acts in place on its own result only
                changes = False
            if not changes:
                continue
            if "inplace" in node.kwargs:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            changed = node.args[0]
            assert isinstance(changed, fx.Node)
            order = {n: i for i, n in enumerate(self.graph.nodes)}
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)

    def _activation(self, node: fx.Node) -> str | None:
        """The activation that a node is, or None."""
        if node.op == "call_module":
            name = activation_of(self._module(node))
            return None if name == "identity" else name
        if node.op == "call_function" and node.target in (F.relu, torch.relu, F.relu6):
            return "relu6" if node.target is F.relu6 else "relu"
        if node.op == "call_method" and node.target == "relu":
            return "relu"
        return None

    def _fuse_batch_norms(self) -> None:
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        found = [node for node in self._nodes() if isinstance(self._module(node), nn.BatchNorm2d)]
        # of two BN layers that meet in an addition the later one takes it: the other's result is there by then
        statistics: dict[fx.Node, fx.Node] = {}
        for node in sorted(found, key=order.__getitem__, reverse=True):
            layer: Any = self._module(node)
            if not _plain_batch_norm(layer):
                self.fallbacks.append(f"{_stock(str(node.target))} ({type(layer).__name__})")
                self._emit(node, node, self.layers.odd_batch_norm(layer), node.args[0], self.segments)
                continue
            activation = activation_of(getattr(layer, "act", None))
            source = node.args[0]
            if activation is None:
                with self.graph.inserting_after(node):
                    after = self.graph.create_node("call_module", self._add_part(_cast(layer.act, self.dtype), node))
                node.replace_all_uses_with(after)
                after.args = (node,)
                self.fallbacks.append(f"{_stock(str(node.target))}.act ({type(layer.act).__name__})")
                after.meta["done"] = True
                activation = "identity"
            last, residual = node, None
            maps = self._joined(source)
            if activation == "identity":
                user = _only_user(node)
                if user is not None and maps is None:
                    residual = _other_addend(user, node)
                    last = user if residual is not None else node
                user = _only_user(last)
                name = None if user is None else self._activation(user)
                if user is not None and name is not None:
                    activation, last = name, user
            if maps is not None:
                known = [self._statistics(one, statistics) for one in maps]
                self._emit(node, last, self.layers.join(layer, activation), maps, known, self.segments)
            else:
                fused = self.layers.batch_norm(layer, activation)
                self._emit(node, last, fused, source, self.segments, residual)

    def _emit(self, node: fx.Node, last: fx.Node, module: Any, *args: Any) -> None:
        """One call of `module` in the place of the nodes from `node` to `last`; its loss goes to the list."""
        with self.graph.inserting_before(last):
            call = self.graph.create_node("call_module", self._add_part(module, node), args)
            y = self.graph.call_function(operator.getitem, (call, 0))
            loss = self.graph.call_function(operator.getitem, (call, 1))
        for new in (call, y, loss):
            new.meta["done"] = True
        self.losses.append((module.index, loss))
        last.replace_all_uses_with(y)
        # dead now: `last`, an addition before it, the BN itself
        for old in (last, *_between(node, last)):
            if not old.users:
                self.graph.erase_node(old)

    def _joined(self, node: Any) -> list[fx.Node] | None:
        """The maps of a concatenation along the channels, or None."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not torch.cat:
            return None
        maps = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1 or not isinstance(maps, (list, tuple)) or not all(isinstance(one, fx.Node) for one in maps):
            return None
        return list(maps)

    def _statistics(self, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
        """The statistics of a map, taken once, right after the map."""
        if node not in known:
            with self.graph.inserting_after(node):
                known[node] = self.graph.call_function(map_statistics, (node, self.segments))
            known[node].meta["done"] = True
        return known[node]

    def _replace_rest(self) -> None:
        """Every other layer by its frozen counterpart; what has none is kept and named in `fallbacks`."""
        for node in self._nodes():
            if node.meta.get("done") or node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                value = _attribute(self.source, str(node.target))
                name = f"constant_{self.count}"
                self.count += 1
                self.parts.register_buffer(name, _converted(value, self.dtype), persistent=False)
                node.target = name
            elif node.op == "call_module":
                self._replace_module(node)
            elif self._activation(node) is not None:
                self._swap(node, _Activation(self._activation(node) or ""))
            elif node.op == "call_function" and not _lean(node):
                self.fallbacks.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
            elif node.op == "call_method" and node.target not in _LEAN_METHODS:
                self.fallbacks.append(f"{node.name} (Tensor.{node.target})")

    def _replace_module(self, node: fx.Node) -> None:
        path = str(node.target)
        module = self._module(node)
        assert module is not None
        if path in self.opaque:
            self._swap(node, self.layers.replaced(module, self.recorder, self.fallbacks, _stock(path)))
            return
        simple = self.layers.simple(module)
        if simple is not None:
            self._swap(node, simple)
            return
        pools = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        if not (pools or isinstance(module, _LEAN_MODULES)):
            self.fallbacks.append(f"{_stock(path)} ({type(module).__name__})")
        self._swap(node, _cast(module, self.dtype))

    def _swap(self, node: fx.Node, module: nn.Module) -> None:
        name = self._add_part(module, node)
        with self.graph.inserting_before(node):
            new = self.graph.create_node(
                "call_module", name, node.args[:1] if isinstance(module, _Activation) else node.args
            )
            if not isinstance(module, _Activation):
                new.kwargs = node.kwargs
        new.meta["done"] = True
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def _stock(path: str) -> str:
    """The stock module's name of a path in the traced wrapper."""
    return path.removeprefix("backbone.net.").removeprefix("backbone.")


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _other_addend(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other tensor that `user` adds to `node`, or None if it is no plain addition of two maps."""
    plain = (
        user.op == "call_function" and user.target in _ADDITIONS or user.op == "call_method" and user.target == "add"
    )
    if not plain or user.kwargs or len(user.args) != 2:
        return None
    first, second = user.args
    other = second if first is node else first
    if not isinstance(other, fx.Node) or other is node:
        return None
    return other if _shape(other) == _shape(node) else None


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _between(node: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes from before `last` back to `node` along their first use of it, nearest first."""
    path, at = [], node
    while at is not last:
        path.append(at)
        user = _only_user(at)
        if user is None:
            break
        at = user
    return path[::-1]


def _lean(node: fx.Node) -> bool:
    if node.target in (F.adaptive_avg_pool2d,):
        return node.args[1] in (1, (1, 1), [1, 1])
    if node.target is operator.mul:  # of numbers, or of a map and a number
        return not all(isinstance(arg, fx.Node) for arg in node.args)
    return node.target in _LEAN_FUNCTIONS
