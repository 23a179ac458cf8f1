"""Early exit tile by tile, for networks whose outputs are maps.

The first exit runs on the whole image. Each later one runs only on tiles of which the ensemble so far is not
confident, from the features of the first exit at its branch point, cut out with a halo around the tile. So a
later exit computes what it would for an image that ends there: convolutions pad at the edge of the cut, and
what is pooled globally, as in squeeze-and-excitation and in the context of LR-ASPP, is pooled over the cut
alone. Its outputs are therefore close to, but not those of the whole image.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.inference.cascade import Cascade, ExitCosts, StoppingRule, exit_costs
from netfission.network import FissionNetwork
from netfission.profiling.macs import Macs, count_macs
from netfission.surgery.features import Features, map_tensors
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.inputs import Inputs, first_rows
from netfission.utils.modes import in_mode

_PROBE = 64  # pixels that are added to find the stride of features; most strides divide it


class TileOutput(NamedTuple):
    """The answers of a cascade of tiles to a batch.

    Attributes:
        logits: `(batch, classes, height, width)`, of the ensemble of the exits that each tile ran.
        exits_used: `(batch, rows, columns)`, int64: their number for each tile, from 1.
    """

    logits: Tensor
    exits_used: Tensor


class _Side:
    """Where tiles lie along the height or the width of an image.

    Args:
        length: of the image in pixels.
        tile: of a tile.
        halo: pixels around it. At the edge of the image the cut is moved inwards, so that all cuts are
            equally long.
        strides: number of features along the image → pixels per feature.
    """

    def __init__(self, length: int, tile: int, halo: int, strides: Mapping[int, int]) -> None:
        self.length, self.tile, self.halo, self.strides = length, tile, halo, strides
        self.cut = min(tile + 2 * halo, length)

    def start(self, number: int) -> int:
        """Return the first pixel of the cut around a tile."""
        return max(0, min(number * self.tile - self.halo, self.length - self.cut))

    def features(self, number: int, length: int) -> slice:
        """Return the positions of the cut among the features of the image."""
        stride = self.strides[length]
        size = min(-(-self.cut // stride), length)
        start = min(self.start(number) // stride, length - size)
        return slice(start, start + size)

    def inside(self, number: int) -> slice:
        """Return the pixels of a tile within its cut."""
        start = number * self.tile - self.start(number)
        return slice(start, start + self.tile)

    def outside(self, number: int) -> slice:
        """Return the pixels of a tile within the image."""
        return slice(number * self.tile, (number + 1) * self.tile)


class TileCascade(nn.Module):
    """A fissioned network of maps that runs its later exits only on tiles that are not certain.

    It shares all weights, records no gradients, and maps images to logits `(batch, classes, height, width)`;
    `run` also returns the number of exits of each tile. See the module for what a later exit sees of the
    image. Features that have no height and width, such as a vector pooled over the image before the branch
    point, are those of the whole image.

    Args:
        network: a `FissionNetwork` of maps, or the result of `deploy_exits`, in eval mode whenever this is
            called.
        thresholds: one per exit but the last, each in [0, 1]: a tile stops if its confidence is above.
        tile: height and width of a tile, in pixels, which divide those of the images. A multiple of the
            stride of the features that later exits read.
        halo: pixels around a tile that later exits see as well, at least 0; such a multiple, too.
        order: every exit once; default cheapest first, see `netfission.inference.exit_costs`.
        example_input: images to find that order with; unused if `order` is given.
        rule: how exits are combined, and how confident a tile is.
        weights: of the exits in the ensemble, see `Cascade`.

    Raises:
        ValueError: an argument is invalid; or, when it is called, tiles do not divide the images, or do not
            begin where features do.

    Example:
        >>> import netfission as nf
        >>> from netfission.tasks.pixel_early_exit import PixelEarlyExit
        >>> layers = [nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.ReLU()) for n in (3, 8, 8)]
        >>> images = torch.rand(2, 3, 16, 16)
        >>> net = nf.fission(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)), 2, example_input=images).eval()
        >>> cascade = TileCascade(net, [0.0], tile=8, example_input=images, rule=PixelEarlyExit())
        >>> output = cascade.run(images)
        >>> output.logits.shape, output.exits_used[0].tolist()  # at 0 each tile stops at the first exit
        (torch.Size([2, 4, 16, 16]), [[1, 1], [1, 1]])
    """

    def __init__(
        self,
        network: FissionNetwork,
        thresholds: Sequence[float],
        *,
        tile: int,
        halo: int = 0,
        order: Sequence[int] | None = None,
        example_input: Inputs | None = None,
        rule: StoppingRule,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive_integer("tile", tile)
        if not isinstance(halo, int) or halo < 0:
            raise invalid("halo", "an integer of at least 0", halo)
        self.cascade = Cascade(
            network, thresholds, order=order, example_input=example_input, rule=rule, weights=weights
        )
        self.rule = rule
        self.tile = tile
        self.halo = halo
        self.training = network.training
        order = self.cascade.order
        depths = self.cascade.branch_depths
        self.starts = [min(depths[number], depths[order[0]]) for number in order]
        self._strides: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = {}  # by size of images
        self.later = [self._later(number, start) for number, start in zip(order, self.starts, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, classes, height, width)`."""
        return self.run(images).logits

    @torch.no_grad()
    def run(self, images: Tensor) -> TileOutput:
        """Images → logits, and how many exits each tile used.

        Raises:
            ValueError: the network is in train mode, or see the class.
        """
        sides = self._sides(images)
        features, output = self._first(images)
        rows, columns = (side.length // side.tile for side in sides)
        used = torch.ones(len(images), rows, columns, dtype=torch.int64, device=images.device)
        tiles = torch.arange(used.numel())
        held = [_cut_out(output, tiles, sides, whole=False)]
        # The first exit's maps are kept for later steps of no tile, but those of the tiles are replaced.
        output, mean = output.clone(), self.cascade.ensemble(held)
        for step in range(1, len(self.starts)):
            threshold = self.cascade.thresholds[step - 1]
            continuing = (self.rule.confidence(mean) <= threshold).nonzero().flatten()
            if not len(continuing):
                break
            tiles = tiles[continuing.cpu()]
            held = [part[continuing] for part in held]
            held.append(self._on_tiles(step, features[self.starts[step]], tiles, sides))
            mean = self.cascade.ensemble(held)
            used.view(-1)[tiles] = step + 1
            _put_back(output, mean, tiles, sides)
        return TileOutput(output, used)

    @torch.no_grad()
    def all_steps(self, images: Tensor) -> list[Tensor]:
        """Return the maps after each step if no tile stops, `(batch, classes, height, width)` each."""
        sides = self._sides(images)
        features, output = self._first(images)
        tiles = torch.arange(len(images) * (sides[0].length // self.tile) * (sides[1].length // self.tile))
        held, maps = [_cut_out(output, tiles, sides, whole=False)], [output]
        for step in range(1, len(self.starts)):
            held.append(self._on_tiles(step, features[self.starts[step]], tiles, sides))
            maps.append(torch.empty_like(output))
            _put_back(maps[-1], self.cascade.ensemble(held), tiles, sides)
        return maps

    @torch.no_grad()
    def count(self, images: Tensor) -> list[Macs]:
        """Count the MACs of each step for one image: the first whole, later ones on all its tiles."""
        image = first_rows(images, 1)
        sides = self._sides(image)
        with in_mode(self.cascade.network, training=False):
            features, _ = self._first(image)
            tiles = (sides[0].length // self.tile) * (sides[1].length // self.tile)
            first = exit_costs(self.cascade.network, image, self.cascade.order)
            found = [Macs(first.dense[0], first.effective[0])]
            for step in range(1, len(self.starts)):
                cut = _cut_features(features[self.starts[step]], torch.arange(1), sides)
                macs = count_macs(self.later[step], cut)
                found.append(Macs(tiles * macs.dense, tiles * macs.effective))
        return found

    def _first(self, images: Tensor) -> tuple[dict[int, Features], Tensor]:
        """Run the first exit on whole images, and return the features that later ones start from."""
        network = self.cascade.network
        if network.training:
            raise invalid("network", "in eval mode", found="train mode", hint="call cascade.eval() first")
        features: dict[int, Features] = {0: network.stem(images)}
        output = self.cascade.run_exit(0, features)
        if output.ndim != 4 or output.shape[2:] != images.shape[2:]:
            expected = "of maps of the images' height and width, for a cascade of tiles"
            raise invalid("network", expected, found=f"outputs of shape {tuple(output.shape)}")
        return features, output

    def _on_tiles(self, step: int, features: Features, tiles: Tensor, sides: tuple[_Side, _Side]) -> Tensor:
        """Run a later exit on tiles, and return its outputs without halo, `(tiles, classes, tile, tile)`."""
        outputs = self.later[step](_cut_features(features, tiles, sides))
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        down, across = sides
        if outputs.shape[2:] != (down.cut, across.cut):
            expected = (
                f"whose later exits give maps of {down.cut}×{across.cut} pixels for such a part of an image"
            )
            raise invalid("network", expected, found=f"{outputs.shape[2]}×{outputs.shape[3]}")
        return torch.stack(
            [
                outputs[index][:, down.inside(row), across.inside(column)]
                for index, (_, row, column) in enumerate(_positions(tiles, sides))
            ]
        )

    def _later(self, number: int, start: int) -> nn.Module:
        """Return what an exit runs on tiles, from the features after `start` stages of exit 0."""
        network = self.cascade.network
        path, trunk = network.exit_paths[number], network.exit_paths[0]
        shared = trunk.stages[start : self.cascade.branch_depths[number]]
        return nn.Sequential(*shared, path if number else path.head)

    def _sides(self, images: Tensor) -> tuple[_Side, _Side]:
        height, width = images.shape[2:]
        if height % self.tile or width % self.tile:
            hint = f"such as {_common_divisor(height, width)}"
            raise invalid(
                "tile", f"a divisor of height and width, {height} and {width}", self.tile, hint=hint
            )
        if (height, width) not in self._strides:
            self._strides[height, width] = self._find_strides(first_rows(images, 1))
        down, across = self._strides[height, width]
        return _Side(height, self.tile, self.halo, down), _Side(width, self.tile, self.halo, across)

    def _find_strides(self, image: Tensor) -> tuple[dict[int, int], dict[int, int]]:
        """Return for height and width: number of features that later exits read → pixels per feature.

        A larger image has as many features more as its added pixels make. The lengths of one image alone do
        not tell: they may be rounded up, or padded.
        """
        read = sorted(set(self.starts[1:]))
        found: tuple[dict[int, int], dict[int, int]] = ({}, {})
        here = self._first(image)[0]
        try:
            larger = self._first(F.pad(image, (0, _PROBE, 0, _PROBE)))[0]
        except Exception:  # a network of one size, whose code may raise anything
            larger = here
        for start in read:
            for tensor, other in zip(_maps(here[start]), _maps(larger[start]), strict=True):
                for side, dimension in enumerate((2, 3)):
                    length, more = tensor.shape[dimension], other.shape[dimension] - tensor.shape[dimension]
                    stride, rest = divmod(_PROBE, more) if more else divmod(image.shape[dimension], length)
                    if rest:
                        expected = "whose features that later exits read are whole pixels apart, for tiles"
                        size = f"{length} along {image.shape[dimension]} pixels"
                        raise invalid("network", expected, found=size)
                    found[side][length] = stride
        largest = max(stride for strides in found for stride in strides.values())
        for name, pixels in (("tile", self.tile), ("halo", self.halo)):
            if pixels % largest:
                hint = "later exits read features that are so many pixels apart"
                raise invalid(name, f"a multiple of {largest}", pixels, hint=hint)
        return found


def tile_costs(
    network: FissionNetwork, example_input: Tensor, *, tile: int, halo: int, order: Sequence[int]
) -> ExitCosts:
    """Count what each exit adds for an image of which no tile stops; halos are counted as often as they run.

    Args:
        network: see `TileCascade`.
        example_input: images `(batch, channels, height, width)`; one of them is used.
        tile: see there.
        halo: see there.
        order: of the exits.
    """
    cascade = TileCascade(
        network, (1.0,) * (len(order) - 1), tile=tile, halo=halo, order=order, rule=_Unused()
    )
    dense, effective = zip(*cascade.count(example_input), strict=True)
    return ExitCosts(tuple(order), dense, effective)


class _Unused:
    """The rule of a cascade of which only costs are counted."""

    name = "none"

    def combined(self, outputs: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        raise NotImplementedError

    def confidence(self, output: Tensor) -> Tensor:
        raise NotImplementedError


def _common_divisor(height: int, width: int) -> int:
    """Return the divisor of both that is nearest to a quarter of the shorter side."""
    shorter = min(height, width)
    divisors = [size for size in range(1, shorter + 1) if height % size == 0 == width % size]
    return min(divisors, key=lambda size: abs(size - shorter / 4))


def _positions(tiles: Tensor, sides: tuple[_Side, _Side]) -> list[tuple[int, int, int]]:
    """Return image, row and column of tiles by their numbers in the batch."""
    rows, columns = (side.length // side.tile for side in sides)
    return [(n // (rows * columns), n // columns % rows, n % columns) for n in tiles.tolist()]


def _maps(features: Features) -> list[Tensor]:
    """Return the tensors that are cut out: those with height and width."""
    tensors = features if isinstance(features, tuple) else (features,)
    return [tensor for tensor in tensors if tensor.ndim == 4 and tensor.shape[2:] != (1, 1)]


def _cut_features(features: Features, tiles: Tensor, sides: tuple[_Side, _Side]) -> Features:
    return map_tensors(lambda tensor: _cut_out(tensor, tiles, sides), features)


def _cut_out(tensor: Tensor, tiles: Tensor, sides: tuple[_Side, _Side], *, whole: bool = True) -> Tensor:
    """Cut features `(batch, channels, height, width)` out around tiles; with `whole=False`, without halo.

    Of features that have no height and width, each tile gets those of its image.
    """
    positions = _positions(tiles, sides)
    if tensor.ndim != 4 or tensor.shape[2:] == (1, 1):
        return tensor[[image for image, _, _ in positions]]
    down, across = sides
    height, width = tensor.shape[2:]
    parts = []
    for image, row, column in positions:
        part = tensor[image : image + 1]
        if whole:
            part = part[:, :, down.features(row, height), across.features(column, width)]
        else:
            part = part[:, :, down.outside(row), across.outside(column)]
        parts.append(part)
    return torch.cat(parts)


def _put_back(maps: Tensor, parts: Tensor, tiles: Tensor, sides: tuple[_Side, _Side]) -> None:
    """Write tiles into maps."""
    down, across = sides
    for part, (image, row, column) in zip(parts, _positions(tiles, sides), strict=True):
        maps[image, :, down.outside(row), across.outside(column)] = part
