"""The pictures: real beside synthetic volumes for the report, and small previews while training.

Arrays are (D, H, W) in RAS: axis 0 to the patient's right, axis 1 to the front, axis 2 up. All planes are shown as
radiologists see them: axial with the front up and coronal with the head up, the patient's right on the viewer's left;
sagittal with the head up and the front on the viewer's left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw
from scipy import ndimage

BACKGROUND, INK = "#101014", "#e8e8ea"
# Okabe and Ito's palette (2008), told apart by colour-blind readers, in an order that suits nested tumour labels.
LABEL_COLOURS = ("#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#e69f00")
PLANES = ("axial", "coronal", "sagittal")
PLANE_NORMALS = (2, 1, 0)  # the array axis each plane cuts
MASK_GROUP, SYNTHETIC_GROUP = 2, 3  # which columns carry the labels
TILE_INCHES = 1.35  # the longest side of any plane
SMALLEST_WIDTH = 5.3  # of a sheet, in inches: what is written below takes as much
PREVIEW_PIXELS = 128  # a preview's planes are enlarged by a whole number to at most about this


@dataclass(frozen=True)
class ContactRow:
    """One case of a contact sheet; the four arrays share one (D, H, W) grid."""

    name: str
    real: np.ndarray  # one channel, [0, 1]
    reconstruction: np.ndarray
    mask: np.ndarray  # whole-number labels, 0 is background
    synthetic: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel: str = ""


def contact_sheet(
    path: str | Path,
    rows: Sequence[ContactRow],
    titles: tuple[str, str, str, str] = ("real", "reconstructed", "mask", "synthetic"),
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    dpi: int = 150,
) -> Path:
    """Draw one line per case: real, reconstructed, mask over real, synthetic with the mask's outline.

    Each is three planes through the centre of the mask's largest part, or the volume's where the mask is empty.

    Args:
        path: the PNG to write.
        rows: the cases, at least one.
        titles: of the four columns.
        labels: names for the legend, by mask value; "label 4" where a name is missing.
        window: the intensities shown as black and as white, the same for every picture, written below them.
        dpi: pixels per inch; a plane's longest side is 1.35 inch.

    Returns:
        The path.

    Raises:
        ValueError: no rows, or a row's arrays differ in shape.
    """
    if not rows:
        raise ValueError("A contact sheet of no rows.")
    for row in rows:
        shapes = {volume.shape for volume in (row.real, row.reconstruction, row.mask, row.synthetic)}
        if len(shapes) > 1:
            raise ValueError(f"{row.name} has arrays of {sorted(shapes)}: give one (D, H, W) grid to all four.")

    extents_mm = np.max([np.multiply(row.real.shape, row.spacing_mm) for row in rows], axis=0)  # (3,)
    layout = _lay_out(extents_mm, [text for row in rows for text in (row.name, row.channel)], len(rows), 4)
    figure = Figure(figsize=(layout.width, layout.height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)  # this figure's own canvas: the backend a notebook has chosen stays
    colours = label_colours([row.mask for row in rows])
    for line, row in enumerate(rows):
        _draw_line(figure, layout, line, row, colours, window)
    _write_around(figure, layout, titles, window)
    _draw_legend(figure, layout, colours, labels or {}, 0.2 / layout.height)
    figure.savefig(path, dpi=dpi, facecolor=BACKGROUND)
    return Path(path)


def overlay(
    path: str | Path,
    volume: np.ndarray,
    mask: np.ndarray | None,
    names: Sequence[str],
    spacing_mm: tuple[float, float, float],
    note: str,
    window: tuple[float, float] = (0.0, 1.0),
    dpi: int = 100,
) -> Path:
    """Draw one line per channel: three planes, and beside them the same with the mask's outline.

    Planes pass through the centre of the mask's largest part, or the volume's where the mask is empty or there is none.

    Args:
        path: the PNG to write.
        volume: (C, D, H, W).
        mask: (D, H, W), whole-number labels, 0 is background; None: no outlines.
        names: of the channels.
        spacing_mm: of the voxels.
        note: written below, before the rest of what is to be said there.
        window, dpi: see `contact_sheet`.

    Returns:
        The path.

    Raises:
        ValueError: the mask's shape is another one than the volume's, or there is another number of names.
    """
    labels = np.zeros(volume.shape[1:], np.uint8) if mask is None else mask
    if labels.shape != volume.shape[1:] or len(names) != len(volume):
        raise ValueError(f"A volume of {volume.shape}, a mask of {labels.shape} and {len(names)} names; see there.")
    num_groups = 1 if mask is None else 2
    layout = _lay_out(np.multiply(labels.shape, spacing_mm), names, len(names), num_groups)
    figure = Figure(figsize=(layout.width, layout.height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)  # this figure's own canvas: the backend a notebook has chosen stays
    colours, centre = label_colours([labels]), _lesion_centre(labels)
    for line, (channel, name) in enumerate(zip(volume, names, strict=True)):
        _write_name(figure, layout, line, name)
        for group in range(num_groups):
            for plane, normal in enumerate(PLANE_NORMALS):
                axes = figure.add_axes(layout.tile(line, group, plane))
                _show(axes, cut_plane(channel, plane, centre[normal]), window, _aspect(spacing_mm, plane))
                if group == 1:
                    _outline(axes, cut_plane(labels, plane, centre[normal]), colours)
                if line == group == 0:
                    _mark_side(axes, plane)
    figure.text(0.08 / layout.width, 1 - 0.22 / layout.height, note, color=INK, fontsize=8, va="center")
    _write_window(figure, layout, window)
    _draw_legend(figure, layout, colours, {}, 1 - 0.22 / layout.height)
    figure.savefig(path, dpi=dpi, facecolor=BACKGROUND)
    return Path(path)


def slices_preview(path: str | Path, images: Sequence[np.ndarray], names: Sequence[str]) -> Path:
    """Tile the three middle planes of every channel, one line per image: real above reconstruction, while training.

    Voxels are drawn square, by repetition, so that nothing is smoothed away.

    Args:
        path: the PNG to write.
        images: (C, D, H, W) each, [0, 1], clipped for display; they may differ in size and channels.
        names: one per image, written at the line's left.

    Returns:
        The path.

    Raises:
        ValueError: no images, or another number of names.
    """
    if not images or len(images) != len(names):
        raise ValueError(f"{len(images)} images and {len(names)} names: give one name to each, at least one.")
    zoom = max(1, PREVIEW_PIXELS // max(max(image.shape[1:]) for image in images))
    lines = [_preview_line(image, zoom) for image in images]
    left, gap = 8 + max(6 * max(map(len, names)), 24), 4
    width = left + max(line.shape[1] for line in lines)
    canvas = Image.new("L", (width, sum(line.shape[0] + gap for line in lines)), 16)
    draw, y = ImageDraw.Draw(canvas), 0
    for line, name in zip(lines, names, strict=True):
        canvas.paste(Image.fromarray(line), (left, y))
        draw.text((4, y + line.shape[0] // 2 - 6), name, fill=232)
        y += line.shape[0] + gap
    canvas.save(path, format="PNG")
    return Path(path)


def cut_plane(volume: np.ndarray, plane: int, index: int) -> np.ndarray:
    """Cut a plane, of `PLANES`, out of a RAS volume (D, H, W), rows from the top and columns from the viewer's left."""
    return np.take(volume, index, axis=PLANE_NORMALS[plane])[::-1, ::-1].T


def label_colours(masks: Sequence[np.ndarray]) -> dict[int, str]:
    """Return a colour for each label above 0 that occurs in any of the masks."""
    values = sorted({int(value) for mask in masks for value in np.unique(mask) if value != 0})
    return {value: LABEL_COLOURS[i % len(LABEL_COLOURS)] for i, value in enumerate(values)}


@dataclass(frozen=True)
class _Layout:
    """Where everything lies, in inches from the upper left."""

    plane_widths: tuple[float, float, float]  # axial, coronal, sagittal
    line_height: float
    num_lines: int
    left: float  # room for the names
    num_groups: int
    gap: float = 0.03
    group_gap: float = 0.14
    margin: float = 0.42  # above and below the lines

    @property
    def group_width(self) -> float:
        return sum(self.plane_widths) + 2 * self.gap

    @property
    def width(self) -> float:
        return max(SMALLEST_WIDTH, self.group_left(self.num_groups) - self.group_gap + 0.08)

    @property
    def height(self) -> float:
        return 2 * self.margin + self.num_lines * (self.line_height + self.gap)

    def group_left(self, group: int) -> float:
        return self.left + group * (self.group_width + self.group_gap)

    def tile(self, line: int, group: int, plane: int) -> tuple[float, float, float, float]:
        """Return matplotlib's (left, bottom, width, height), in fractions of the figure."""
        x = self.group_left(group) + sum(self.plane_widths[:plane]) + plane * self.gap
        y = self.height - self.margin - line * (self.line_height + self.gap) - self.line_height
        width, height = self.plane_widths[plane], self.line_height
        return x / self.width, y / self.height, width / self.width, height / self.height


def _lay_out(extents_mm: np.ndarray, texts: Sequence[str], num_lines: int, num_groups: int) -> _Layout:
    across, along, up = (float(extent) for extent in extents_mm * TILE_INCHES / extents_mm.max())
    left = 0.2 + 0.065 * max(map(len, texts))
    return _Layout((across, across, along), max(along, up), num_lines, left, num_groups)


def _draw_line(
    figure: Figure,
    layout: _Layout,
    line: int,
    row: ContactRow,
    colours: Mapping[int, str],
    window: tuple[float, float],
) -> None:
    _write_name(figure, layout, line, f"{row.name}\n{row.channel}".strip())
    centre = _lesion_centre(row.mask)
    for group, volume in enumerate((row.real, row.reconstruction, row.real, row.synthetic)):
        for plane, normal in enumerate(PLANE_NORMALS):
            axes = figure.add_axes(layout.tile(line, group, plane))
            aspect = _aspect(row.spacing_mm, plane)
            _show(axes, cut_plane(volume, plane, centre[normal]), window, aspect)
            labels = cut_plane(row.mask, plane, centre[normal])
            if group == MASK_GROUP:
                _fill(axes, labels, colours, aspect)
            if group == SYNTHETIC_GROUP:
                _outline(axes, labels, colours)
            if line == 0 and group == 0:
                _mark_side(axes, plane)


def _write_name(figure: Figure, layout: _Layout, line: int, text: str) -> None:
    _, bottom, _, height = layout.tile(line, 0, 0)
    figure.text(0.08 / layout.width, bottom + height / 2, text, color=INK, fontsize=7, va="center")


def _write_around(figure: Figure, layout: _Layout, titles: Sequence[str], window: tuple[float, float]) -> None:
    for group, title in enumerate(titles):
        x = (layout.group_left(group) + layout.group_width / 2) / layout.width
        figure.text(x, 1 - 0.22 / layout.height, title, color=INK, fontsize=10, ha="center", va="center")
    _write_window(figure, layout, window)


def _write_window(figure: Figure, layout: _Layout, window: tuple[float, float]) -> None:
    note = (
        f"grey window {window[0]:g} to {window[1]:g}; {', '.join(PLANES)} through the lesion's centre; "
        "R, A: the patient's right, front"
    )
    figure.text(0.08 / layout.width, 0.2 / layout.height, note, color=INK, fontsize=7, va="center")


def _draw_legend(
    figure: Figure, layout: _Layout, colours: Mapping[int, str], names: Mapping[int, str], height: float
) -> None:
    handles = [Patch(color=colour, label=names.get(value, f"label {value}")) for value, colour in colours.items()]
    if handles:
        figure.legend(
            handles=handles,
            loc="center right",
            bbox_to_anchor=(1.0, height),
            ncols=len(handles),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )


def _lesion_centre(mask: np.ndarray) -> tuple[int, int, int]:
    parts, num_parts = ndimage.label(mask > 0)
    if num_parts == 0:
        d, h, w = mask.shape
        return d // 2, h // 2, w // 2
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    d, h, w = ndimage.center_of_mass(parts == largest)
    return round(d), round(h), round(w)


def _aspect(spacing_mm: tuple[float, float, float], plane: int) -> float:
    """Return a pixel's height over its width."""
    columns, rows = [axis for axis in range(3) if axis != PLANE_NORMALS[plane]]
    return spacing_mm[rows] / spacing_mm[columns]


def _show(axes: Axes, picture: np.ndarray, window: tuple[float, float], aspect: float) -> None:
    axes.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest", aspect=aspect)
    axes.set_axis_off()
    axes.set_autoscale_on(False)  # or an outline would shrink its picture


def _fill(axes: Axes, labels: np.ndarray, colours: Mapping[int, str], aspect: float) -> None:
    overlay = np.zeros((*labels.shape, 4))
    for value, colour in colours.items():
        overlay[labels == value] = to_rgba(colour, alpha=0.75)
    axes.imshow(overlay, interpolation="nearest", aspect=aspect)


def _outline(axes: Axes, labels: np.ndarray, colours: Mapping[int, str]) -> None:
    for value, colour in colours.items():
        region = np.pad(labels == value, 1)  # so that an outline closes at the picture's edge
        if region.any():
            rows, columns = np.arange(region.shape[0]) - 1, np.arange(region.shape[1]) - 1
            axes.contour(columns, rows, region, levels=[0.5], colors=[colour], linewidths=0.6)


def _mark_side(axes: Axes, plane: int) -> None:
    letter = "A" if PLANES[plane] == "sagittal" else "R"
    axes.text(0.02, 0.5, letter, transform=axes.transAxes, color=INK, fontsize=6, va="center")


def _preview_line(image: np.ndarray, zoom: int) -> np.ndarray:
    grey = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    middle = [image.shape[1 + normal] // 2 for normal in PLANE_NORMALS]
    tiles = [cut_plane(channel, plane, index) for channel in grey for plane, index in enumerate(middle)]
    height = max(tile.shape[0] for tile in tiles)
    padded = []
    for tile in tiles:
        above = (height - tile.shape[0]) // 2
        padded.append(np.pad(tile, ((above, height - tile.shape[0] - above), (0, 1)), constant_values=16))
    return np.concatenate(padded, axis=1).repeat(zoom, 0).repeat(zoom, 1)
