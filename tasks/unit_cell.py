"""The crystal's unit cell: read it, know its lattice, compare orientations.

Convention used by every kernel: the 3x3 matrices ``B`` (crystal frame) and ``A`` (laboratory
frame) hold the reciprocal axes a*, b*, c* as **columns**, in 1/Å without 2π, so that
``q = A @ h`` for one reflection and ``q = hkl @ A.T`` for a table of them. The rows of
``inv(A)`` are the real axes a, b, c in Å. The Cartesian crystal frame is the PDB's: a along x,
b in the xy plane. ``det(A) > 0`` always; a negative one is the mirror image of the crystal.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import gemmi
import numpy as np

from storage.errors import BadRecipe

__all__ = [
    "BadCell",
    "UnitCell",
    "cell_file_text",
    "crystfel_lattice",
    "have_one_lattice",
    "hkl_symmetry_ops",
    "lattice_rotations",
    "parameters_from_matrix",
    "read_cell",
    "reduce_rows",
    "rotation_angle_deg",
    "same_orientation",
    "symmetrised",
    "unimodular_matrices",
]

# Real-space primitive axes (rows) in terms of the centred cell's axes, International Tables A, 1.5.4.
_PRIMITIVE_ROWS = {
    "P": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "A": [[1, 0, 0], [0, 0.5, 0.5], [0, -0.5, 0.5]],
    "B": [[0.5, 0, 0.5], [0, 1, 0], [-0.5, 0, 0.5]],
    "C": [[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]],
    "I": [[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]],
    "F": [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
    "R": [[2 / 3, 1 / 3, 1 / 3], [-1 / 3, 1 / 3, 1 / 3], [-1 / 3, -2 / 3, 1 / 3]],
}
# CrystFEL .cell files name a lattice but no space group; the highest proper symmorphic group is assumed.
_SYMMORPHIC = {
    "triclinic": "{c} 1",
    "monoclinic": "{c} 1 2 1",
    "orthorhombic": "{c} 2 2 2",
    "tetragonal": "{c} 4 2 2",
    "hexagonal": "{c} 6 2 2",
    "cubic": "{c} 4 3 2",
}
_MONOCLINIC_BY_AXIS = {"a": "{c} 2 1 1", "b": "{c} 1 2 1", "c": "{c} 1 1 2"}
# Of a sphere of reflections: bounds memory to about 4 GB.
_MOST_REFLECTIONS = 3e7
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SIX_NUMBERS = re.compile(rf"\s*\(?\s*{_NUMBER}(?:[\s,]+{_NUMBER}){{5}}\s*\)?\s*")


class BadCell(BadRecipe):
    """A unit cell that cannot be read, or contradicts its space group."""


@dataclass(frozen=True)
class UnitCell:
    """A unit cell with its symmetry.

    a, b, c : Å. alpha, beta, gamma : degrees.
    space_group : extended Hermann-Mauguin name as gemmi writes it, e.g. ``P 43 21 2`` or ``R 3:H``.
    """

    a: float
    b: float
    c: float
    alpha: float = 90.0
    beta: float = 90.0
    gamma: float = 90.0
    space_group: str = "P 1"

    def __post_init__(self) -> None:
        _check_parameters(self.parameters)
        group = gemmi.find_spacegroup_by_name(self.space_group, self.alpha, self.gamma)
        if group is None:
            raise BadCell(f"space group {self.space_group!r} is unknown; write it like 'P 43 21 2' or 'R 3:H'")
        object.__setattr__(self, "space_group", group.xhm())
        if not gemmi.UnitCell(*self.parameters).is_compatible_with_spacegroup(group, 2e-3):
            raise BadCell(
                f"cell {self.describe()} does not have the symmetry of {group.xhm()} ({group.crystal_system_str()}); "
                "correct the cell, or name the setting that it is in (unique axis, H or R)"
            )

    @property
    def parameters(self) -> tuple[float, float, float, float, float, float]:
        """(a, b, c, alpha, beta, gamma), Å and degrees."""
        return self.a, self.b, self.c, self.alpha, self.beta, self.gamma

    @cached_property
    def group(self) -> gemmi.SpaceGroup:
        """gemmi's space group."""
        return gemmi.SpaceGroup(self.space_group)

    @property
    def point_group(self) -> str:
        """Hermann-Mauguin point group, e.g. ``422``."""
        return str(self.group.point_group_hm())

    @property
    def lattice(self) -> str:
        """Crystal system: triclinic, monoclinic, … cubic (trigonal is named as such)."""
        return str(self.group.crystal_system_str())

    @property
    def centring(self) -> str:
        """P, A, B, C, I, F, or R for a rhombohedral lattice on hexagonal axes."""
        return str(self.group.centring_type())

    @property
    def volume(self) -> float:
        """Å³ of the (centred) cell."""
        return float(gemmi.UnitCell(*self.parameters).volume)

    @cached_property
    def B(self) -> np.ndarray:  # noqa: N802 (the matrix is called B)
        """(3, 3), 1/Å: a*, b*, c* as columns in the crystal frame (a along x, b in xy)."""
        B = np.array(gemmi.UnitCell(*self.parameters).frac.mat.tolist(), float).T.copy()
        B.flags.writeable = False
        return B

    @cached_property
    def primitive_rows(self) -> np.ndarray:
        """(3, 3): a short primitive basis; its rows times the centred axes give the primitive axes.

        Right-handed and shortest-vector reduced, so that direction sampling meets short axes.
        """
        rows = np.array(_PRIMITIVE_ROWS[self.centring], float)
        return reduce_rows(rows, np.linalg.inv(self.B))

    def with_parameters(self, parameters: Sequence[float]) -> "UnitCell":
        """The same symmetry with other cell edges and angles."""
        a, b, c, alpha, beta, gamma = (float(v) for v in parameters)
        return replace(self, a=a, b=b, c=c, alpha=alpha, beta=beta, gamma=gamma)

    def with_matrix(self, A: np.ndarray) -> "UnitCell":
        """The same symmetry with the edges and angles that a reciprocal matrix describes."""
        return self.with_parameters(parameters_from_matrix(A))

    def hkl_within(self, q_max: float) -> np.ndarray:
        """All (n, 3) int32 hkl with 0 < |q| <= q_max (1/Å) that the centring allows, sorted.

        Screw and glide absences are kept: whether they are seen is for merging to say.
        """
        expected = 4 / 3 * np.pi * q_max**3 * self.volume
        if not expected <= _MOST_REFLECTIONS:
            raise BadCell(f"about {expected:.1e} reflections to d = {1 / q_max:g} Å are too many; raise d_min")
        limits = np.floor(q_max * np.linalg.norm(np.linalg.inv(self.B), axis=1)).astype(int)
        h = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in limits), indexing="ij"), -1).reshape(-1, 3)
        squared = ((h @ self.B.T) ** 2).sum(1)
        h = h[(squared <= q_max * q_max) & (squared > 0)]
        index = h @ self.primitive_rows.T
        return h[np.abs(index - np.rint(index)).max(axis=1, initial=0.0) < 1e-6].astype(np.int32)

    def describe(self) -> str:
        """The six numbers and the group on one line."""
        return ", ".join(f"{v:g}" for v in self.parameters) + f" {self.space_group}"


def read_cell(source: "str | Path | Sequence[float] | UnitCell", space_group: str | None = None) -> UnitCell:
    """A unit cell from a file or from numbers.

    Parameters
    ----------
    source : path of a CrystFEL ``.cell``, PDB, mmCIF or MTZ file; or six numbers (Å, degrees),
        as a sequence or as text like ``79.1,79.1,37.9,90,90,90``.
    space_group : overrides the file's; a ``.cell`` file names none, and then the highest
        symmorphic rotation group of its lattice is assumed (e.g. P 4 2 2).

    Raises
    ------
    BadCell : unreadable, impossible, or in contradiction to the space group.
    """
    if isinstance(source, UnitCell):
        return source if space_group is None else replace(source, space_group=space_group)
    if not isinstance(source, str | Path):
        return _from_numbers(list(source), space_group)
    if isinstance(source, str) and _SIX_NUMBERS.fullmatch(source):
        return _from_numbers([float(v) for v in re.findall(_NUMBER, source)], space_group)
    path = Path(source)
    if not path.is_file():
        raise BadCell(
            f"{str(source)!r} is neither a file nor six numbers; give a cell file or 'a,b,c,alpha,beta,gamma'"
        )
    parameters, found = _read_file(path)
    return _from_numbers(parameters, space_group or found)


def cell_file_text(cell: UnitCell) -> str:
    """A CrystFEL unit cell file, version 1.0."""
    lattice, unique = crystfel_lattice(cell)
    lines = ["CrystFEL unit cell file version 1.0", "", f"lattice_type = {lattice}", f"centering = {cell.centring}"]
    if unique != "*":
        lines.append(f"unique_axis = {unique}")
    lines += [f"{name} = {value:.5f} A" for name, value in zip("abc", cell.parameters[:3], strict=True)]
    lines += [f"{n} = {v:.5f} deg" for n, v in zip(("al", "be", "ga"), cell.parameters[3:], strict=True)]
    return "\n".join(lines) + "\n"


def parameters_from_matrix(A: np.ndarray) -> tuple[float, float, float, float, float, float]:
    """(a, b, c, alpha, beta, gamma) of a reciprocal matrix with a*, b*, c* as columns."""
    # Python's own numbers: for three vectors they take a fifth of the time.
    rows = np.linalg.inv(np.asarray(A, float)).tolist()
    a, b, c = (math.hypot(*row) for row in rows)
    pairs = ((rows[1], rows[2], b * c), (rows[0], rows[2], a * c), (rows[0], rows[1], a * b))
    cosines = ((u[0] * v[0] + u[1] * v[1] + u[2] * v[2]) / size for u, v, size in pairs)
    alpha, beta, gamma = (math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines)
    return a, b, c, alpha, beta, gamma


def hkl_symmetry_ops(cell: UnitCell) -> np.ndarray:
    """Proper rotations of the crystal's point group on indices, (n, 3, 3) int: ``h' = ops[i] @ h``.

    Rotations only: their hkl are the same reflection of the same crystal. Friedel mates are
    not in the set, so that Bijvoet pairs stay apart.
    """
    ops = cell.group.operations().derive_symmorphic().sym_ops
    matrices = {tuple(np.rint(np.array(op.rot).T / gemmi.Op.DEN).astype(int).ravel()) for op in ops}
    out = np.array(sorted(matrices)).reshape(-1, 3, 3)
    return out[np.rint(np.linalg.det(out)) > 0]


def symmetrised(A: np.ndarray, cell: UnitCell) -> np.ndarray:
    """The lattice with the symmetry of ``cell`` that is nearest to A: mean metric, same orientation.

    Programs that refine all six parameters, or print few digits, give edges and angles that only nearly obey it.

    Parameters
    ----------
    A : (3, 3), 1/Å, columns a*, b*, c*.
    """
    ops = hkl_symmetry_ops(cell).astype(float)
    # hkl and W hkl are equally long.
    metric = (ops.transpose(0, 2, 1) @ (A.T @ A) @ ops).mean(axis=0)
    B = np.linalg.cholesky(metric).T
    u, _, vt = np.linalg.svd(A @ np.linalg.inv(B))
    return np.asarray(u @ vt @ B)


def lattice_rotations(cell: UnitCell, tolerance: float = 2e-3) -> np.ndarray:
    """Proper rotations of the LATTICE on indices, (n, 3, 3) int: ``W @ A = A @ ops[i]`` for a rotation W.

    Found from the metric alone, so they include what the lattice has beyond the point group
    (merohedry, or a = b by accident within the relative ``tolerance``). Two A matrices that
    differ by one of them explain the same spot positions.

    In a Buerger-reduced basis every symmetry operation has elements -1, 0, 1 (Le Page 1982), so
    all 3**9 matrices are tried.
    """
    T = cell.primitive_rows
    rows = T @ np.linalg.inv(cell.B)
    metric = rows @ rows.T
    candidates = unimodular_matrices()
    moved = candidates @ metric @ candidates.transpose(0, 2, 1)
    scale = np.sqrt(np.outer(np.diag(metric), np.diag(metric)))
    kept = candidates[(np.abs(moved - metric) <= 2 * tolerance * scale).all(axis=(1, 2))]
    return np.rint(np.linalg.inv(T) @ kept @ T).astype(int)


@cache
def unimodular_matrices() -> np.ndarray:
    """(n, 3, 3) int: the matrices of elements -1, 0, 1 and determinant 1."""
    every = np.array(list(product((-1, 0, 1), repeat=9))).reshape(-1, 3, 3)
    return every[np.rint(np.linalg.det(every)) == 1]


def same_orientation(
    A_found: np.ndarray, A_true: np.ndarray, cell: UnitCell, tolerance_deg: float = 1.0, max_strain: float = 0.05
) -> tuple[bool, float]:
    """Whether two A matrices are one orientation up to the lattice's proper rotations.

    Returns
    -------
    (is_same, angle_deg) : the smallest rotation angle left over; 180 when the hands differ or
        the cells differ by more than ``max_strain`` for every symmetry operation.
    """
    if np.linalg.det(A_found) * np.linalg.det(A_true) <= 0:
        return False, 180.0
    rest = A_found @ lattice_rotations(cell) @ np.linalg.inv(A_true)
    u, s, vt = np.linalg.svd(rest)
    fits = (np.abs(s - 1) < max_strain).all(axis=1)
    if not fits.any():
        return False, 180.0
    angle = min(rotation_angle_deg(m) for m in (u @ vt)[fits])
    return angle <= tolerance_deg, angle


def have_one_lattice(one: UnitCell, other: UnitCell, tolerance: float = 0.05) -> bool:
    """Whether two cells, in whatever setting and centring, are of one lattice, lengths within ``tolerance``.

    Compared are the lengths of the shortest vectors, which do not jump where two settings are nearly alike, and the
    volumes, which tell a lattice from those that have some of its points.
    """
    axes, theirs = (cell.primitive_rows @ np.linalg.inv(cell.B) for cell in (one, other))
    lengths, their_lengths = (np.sort(np.linalg.norm(rows, axis=1)) for rows in (axes, theirs))
    growth = abs(np.log(np.linalg.det(axes) / np.linalg.det(theirs)))
    return bool(np.allclose(lengths, their_lengths, rtol=tolerance, atol=0) and growth < 3 * tolerance)


def rotation_angle_deg(R: np.ndarray) -> float:
    """Angle of a proper rotation matrix in degrees, exact also for small angles."""
    twice_sine = np.linalg.norm([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    return float(np.degrees(np.arctan2(twice_sine, np.trace(R) - 1)))


def crystfel_lattice(cell: UnitCell) -> tuple[str, str]:
    """CrystFEL's lattice_type and unique_axis."""
    lattice = cell.lattice
    if lattice in ("tetragonal",):
        return lattice, "c"
    if lattice in ("trigonal", "hexagonal"):
        return ("rhombohedral", "*") if cell.centring == "R" and cell.gamma < 100 else ("hexagonal", "c")
    if lattice == "monoclinic":
        angles = dict(zip("abc", cell.parameters[3:], strict=True))
        return lattice, next((axis for axis, angle in angles.items() if abs(angle - 90) > 1e-3), "b")
    return lattice, "*"


def _check_parameters(parameters: Sequence[float]) -> None:
    lengths, angles = parameters[:3], parameters[3:]
    if not all(map(math.isfinite, parameters)) or min(lengths) < 1 or max(lengths) > 10000:
        raise BadCell(f"cell edges {lengths} Å are not between 1 and 10000; give lengths in Å")
    if min(angles) < 10 or max(angles) > 170:
        raise BadCell(f"cell angles {angles} are not between 10 and 170; give angles in degrees")
    ca, cb, cg = (math.cos(math.radians(angle)) for angle in angles)
    if 1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg <= 1e-6:
        raise BadCell(f"cell angles {angles}° enclose no volume; check alpha, beta and gamma")


def _from_numbers(numbers: Sequence[float], space_group: str | None) -> UnitCell:
    if len(numbers) != 6:
        raise BadCell(f"{len(numbers)} cell parameters given; six are needed: a, b, c (Å) and alpha, beta, gamma (°)")
    try:
        a, b, c, alpha, beta, gamma = (float(v) for v in numbers)
    except (TypeError, ValueError) as error:
        raise BadCell(f"cell parameters {numbers!r} are not six numbers; give Å and degrees") from error
    return UnitCell(a, b, c, alpha, beta, gamma, space_group or "P 1")


def _read_file(path: Path) -> tuple[list[float], str | None]:
    """Six parameters and the space group's name, None when the file has none."""
    try:
        if path.read_bytes()[:4] == b"MTZ ":
            mtz = gemmi.read_mtz_file(str(path))
            return list(mtz.cell.parameters), mtz.spacegroup.xhm() if mtz.spacegroup else None
        text = path.read_text(errors="replace")
        if re.search(r"^\s*CrystFEL unit cell file", text):
            return _parse_cell_file(text, path)
        if path.suffix.lower() in (".pdb", ".ent") or re.search(r"^CRYST1", text, re.M):
            return _from_structure(gemmi.read_pdb_string(text), path)
        return _from_cif(gemmi.cif.read_string(text), path)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, BadCell):
            raise
        raise BadCell(f"{path} is no .cell, PDB, mmCIF or MTZ file ({error}); give another or six numbers") from error


def _from_structure(structure: gemmi.Structure, path: Path) -> tuple[list[float], str | None]:
    if not structure.cell.is_crystal():
        raise BadCell(f"{path} holds no unit cell (CRYST1 is missing or 1 1 1); give the six numbers instead")
    return list(structure.cell.parameters), structure.spacegroup_hm or None


def _from_cif(document: gemmi.cif.Document, path: Path) -> tuple[list[float], str | None]:
    names = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"]
    for block in document:
        for prefix in ("_cell.", "_cell_"):
            values = [block.find_value(prefix + name) for name in names]
            if all(v not in (None, "?", ".") for v in values):
                return [gemmi.cif.as_number(v) for v in values], _cif_group(block)
    raise BadCell(f"{path} holds no complete _cell.length/_cell.angle; give the six numbers instead")


def _cif_group(block: gemmi.cif.Block) -> str | None:
    for name in ("_symmetry.space_group_name_H-M", "_space_group.name_H-M_alt", "_symmetry_space_group_name_H-M"):
        value = block.find_value(name)
        if value and value not in ("?", "."):
            return str(gemmi.cif.as_string(value))
    return None


def _parse_cell_file(text: str, path: Path) -> tuple[list[float], str]:
    """CrystFEL unit cell file version 1.0: ``key = value [unit]`` lines, ``;`` starts a comment."""
    found: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        key, equals, value = line.split(";")[0].partition("=")
        if equals:
            found[key.strip()] = value.strip()
    try:
        lengths = [_with_unit(found[k], {"A": 1.0, "nm": 10.0}) for k in ("a", "b", "c")]
        angles = [_with_unit(found[k], {"deg": 1.0, "rad": 180 / np.pi}) for k in ("al", "be", "ga")]
        return lengths + angles, _group_of_lattice(found, path)
    except KeyError as error:
        raise BadCell(f"{path} has no usable {error.args[0]!r}; it needs a, b, c (A) and al, be, ga (deg)") from error


def _with_unit(text: str, scales: dict[str, float]) -> float:
    number, _, unit = text.partition(" ")
    if unit.strip() not in scales:
        raise BadCell(f"unit in {text!r} is not one of {', '.join(scales)}; correct the .cell file")
    return float(number) * scales[unit.strip()]


def _group_of_lattice(found: dict[str, str], path: Path) -> str:
    lattice, centring = found.get("lattice_type", "triclinic"), found.get("centering", "P")
    if centring == "H":
        return "R 3 2:H"
    if lattice == "rhombohedral":
        return "R 3 2:R"
    if lattice == "monoclinic":
        return _MONOCLINIC_BY_AXIS[found.get("unique_axis", "b")].format(c=centring)
    if lattice not in _SYMMORPHIC:
        raise BadCell(f"{path}: lattice_type {lattice!r} is not one of {', '.join(_SYMMORPHIC)}, rhombohedral")
    return _SYMMORPHIC[lattice].format(c=centring)


def reduce_rows(rows: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Shortest-vector reduction of ``rows @ axes``: subtract whole vectors while one gets shorter."""
    rows = rows.copy()
    steps = np.array([s for s in product((-1, 0, 1), repeat=2) if any(s)])
    shortened = True
    while shortened:
        shortened = False
        rows = rows[np.argsort(np.linalg.norm(rows @ axes, axis=1), kind="stable")]
        for i in (2, 1, 0):
            others = rows[[j for j in range(3) if j != i]]
            trials = rows[i] + steps @ others
            lengths = np.linalg.norm(trials @ axes, axis=1)
            if lengths.min() < np.linalg.norm(rows[i] @ axes) * (1 - 1e-9):
                rows[i] = trials[lengths.argmin()]
                shortened = True
                break
    return rows if np.linalg.det(rows @ axes) > 0 else -rows
