import gemmi
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from storage.errors import BadRecipe, NearlineError
from tasks.unit_cell import (
    BadCell,
    UnitCell,
    hkl_symmetry_ops,
    lattice_rotations,
    parameters_from_matrix,
    read_cell,
    same_orientation,
    symmetrised,
)

CELLS = {
    "triclinic": ((71, 83, 97, 78, 95, 107), "P 1", 1, 1, 1),
    "monoclinic": ((60, 50, 90, 90, 112, 90), "C 1 2 1", 2, 2, 2),
    "orthorhombic": ((61, 72, 83, 90, 90, 90), "P 21 21 21", 4, 4, 1),
    "body centred": ((60, 60, 95, 90, 90, 90), "I 4", 8, 4, 2),
    "tetragonal": ((79.1, 79.1, 37.9, 90, 90, 90), "P 43 21 2", 8, 8, 1),
    "rhombohedral H": ((101, 101, 210, 90, 90, 120), "R 3:H", 6, 3, 3),
    "hexagonal": ((60, 60, 85, 90, 90, 120), "P 61", 12, 6, 1),
    "face centred": ((80, 80, 80, 90, 90, 90), "F 4 3 2", 24, 24, 4),
}
TABLE = pytest.mark.parametrize(("numbers", "group", "n_lattice", "n_point", "n_centred"), CELLS.values(), ids=CELLS)


@TABLE
def test_reciprocal_matrix_against_gemmi(numbers, group, n_lattice, n_point, n_centred):
    cell = UnitCell(*numbers, group)
    for h in ([1, 0, 0], [0, 2, 0], [0, 0, 3], [1, -2, 3]):
        assert np.linalg.norm(cell.B @ h) == pytest.approx(1 / gemmi.UnitCell(*numbers).calculate_d(h))
    assert np.linalg.det(cell.B) > 0
    assert parameters_from_matrix(cell.B) == pytest.approx(numbers)


@TABLE
def test_symmetry_orders(numbers, group, n_lattice, n_point, n_centred):
    cell = UnitCell(*numbers, group)
    assert len(lattice_rotations(cell)) == n_lattice
    assert len(hkl_symmetry_ops(cell)) == n_point
    assert np.linalg.det(cell.primitive_rows) == pytest.approx(1 / n_centred)


@TABLE
def test_symmetry_ops_keep_the_resolution_and_the_hand(numbers, group, n_lattice, n_point, n_centred):
    cell = UnitCell(*numbers, group)
    h = np.array([3, -1, 2])
    for op in (*lattice_rotations(cell), *hkl_symmetry_ops(cell)):
        assert np.linalg.norm(cell.B @ op @ h) == pytest.approx(np.linalg.norm(cell.B @ h), rel=1e-9)
        assert np.linalg.det(op) == pytest.approx(1)


@TABLE
def test_same_orientation_knows_equivalents_angles_and_hands(numbers, group, n_lattice, n_point, n_centred):
    cell = UnitCell(*numbers, group)
    A = Rotation.random(random_state=1).as_matrix() @ cell.B
    turned = (
        Rotation.from_rotvec(np.radians(0.4) * np.array([0.6, 0, 0.8])).as_matrix() @ A @ lattice_rotations(cell)[-1]
    )
    assert same_orientation(turned, A, cell) == (True, pytest.approx(0.4))
    assert same_orientation(turned, A, cell, tolerance_deg=0.3)[0] is False
    assert same_orientation(-A, A, cell) == (False, 180.0)
    assert same_orientation(1.2 * A, A, cell) == (False, 180.0)


@pytest.mark.parametrize("group", ["I 4", "F 4 3 2", "C 1 2 1", "R 3:H", "P 43 21 2"])
def test_centring_absences_as_gemmi_counts_them(group):
    numbers = next(n for n, g, *_ in CELLS.values() if g == group)
    cell, operations = UnitCell(*numbers, group), gemmi.SpaceGroup(group).operations()
    centring = gemmi.GroupOps([gemmi.Op("x,y,z")])
    centring.cen_ops = operations.cen_ops
    found = {tuple(h) for h in cell.hkl_within(0.08)}
    grid = range(-20, 21)
    expected = {
        (h, k, m)
        for h in grid for k in grid for m in grid
        if (h or k or m)
        and gemmi.UnitCell(*numbers).calculate_1_d2([h, k, m]) <= 0.08**2
        and not centring.is_systematically_absent([h, k, m])
    }  # fmt: skip
    assert found == expected


CRYSTFEL = """CrystFEL unit cell file version 1.0

lattice_type = {lattice}
centering = {centring}
{axis}
a = 60.0 A
b = 50 A
c = 9.0 nm   ; a comment
al = 90 deg
be = 112.0 deg
ga = 90 deg
"""


def test_reads_crystfel_cell_file(tmp_path):
    path = tmp_path / "a.cell"
    path.write_text(CRYSTFEL.format(lattice="monoclinic", centring="C", axis="unique_axis = b"))
    cell = read_cell(path)
    assert (cell.parameters, cell.space_group) == ((60, 50, 90, 90, 112, 90), "C 1 2 1")


MMCIF = """data_x
_cell.length_a 79.1
_cell.length_b 79.1
_cell.length_c 37.9(2)
_cell.angle_alpha 90
_cell.angle_beta 90
_cell.angle_gamma 90
_symmetry.space_group_name_H-M 'P 43 21 2'
"""


def test_accidental_symmetry_of_the_lattice_is_found():
    # c = sqrt(2) a of a body-centred tetragonal cell is face-centred cubic in another description.
    assert len(lattice_rotations(UnitCell(60, 60, 60 * 2**0.5, 90, 90, 90, "I 4"))) == 24


def test_reads_pdb_mmcif_mtz_and_numbers(tmp_path):
    numbers, group = (79.1, 79.1, 37.9, 90, 90, 90), "P 43 21 2"
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*numbers), group
    (tmp_path / "a.pdb").write_text(structure.make_pdb_string())
    (tmp_path / "a.cif").write_text(MMCIF)
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup, mtz.cell = gemmi.SpaceGroup(group), gemmi.UnitCell(*numbers)
    mtz.set_data(np.array([[1, 0, 0]], np.float32))
    mtz.write_to_file(str(tmp_path / "a.mtz"))
    for source in (tmp_path / "a.pdb", str(tmp_path / "a.cif"), tmp_path / "a.mtz"):
        cell = read_cell(source)
        assert cell.parameters == pytest.approx(numbers)
        assert cell.space_group == group
    assert read_cell("79.1,79.1,37.9,90,90,90", group) == read_cell(list(numbers), group) == UnitCell(*numbers, group)


BAD = {
    "no such file": ("nowhere.cell", "neither a file nor six numbers"),
    "five numbers": ([1.0, 2, 3, 4, 5], "six are needed"),
    "not numbers": (["a", 2, 3, 4, 5, 6], "not six numbers"),
    "tiny edge": ("0,79,37,90,90,90", "between 1 and 10000"),
    "not a number": ([np.nan, 79, 37, 90, 90, 90], "between 1 and 10000"),
    "flat": ("50,60,70,60,60,125", "enclose no volume"),
}


@pytest.mark.parametrize(("source", "words"), BAD.values(), ids=BAD)
def test_bad_cells_say_why(source, words):
    with pytest.raises(BadCell, match=words):
        read_cell(source)


def test_bad_groups_and_files_say_why(tmp_path):
    assert issubclass(BadCell, BadRecipe)
    assert issubclass(BadCell, NearlineError)
    with pytest.raises(BadCell, match="unknown"):
        UnitCell(50, 50, 50, 90, 90, 90, "P 99")
    with pytest.raises(BadCell, match="does not have the symmetry"):
        UnitCell(50, 60, 70, 90, 90, 90, "P 43 21 2")
    for name, text in {
        "a.cell": CRYSTFEL.format(lattice="cubical", centring="P", axis=""),
        "b.cell": "CrystFEL unit cell file version 1.0\na = 50 furlong\n",
        "c.pdb": "REMARK nothing\n",
        "d.cif": "data_x\n_other.tag 1\n",
        "e.cif": "this is prose, not a file of any kind\n",
        "f.mtz": "MTZ but not really",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BadCell, match=name.replace(".", r"\.") if name != "b.cell" else "unit in"):
            read_cell(tmp_path / name)


@TABLE
def test_a_nearly_symmetric_lattice_gets_its_symmetry(numbers, group, n_lattice, n_point, n_centred):
    cell, rng = UnitCell(*numbers, group), np.random.default_rng(5)
    exact = Rotation.random(random_state=rng).as_matrix() @ cell.B
    np.testing.assert_allclose(symmetrised(exact, cell), exact, atol=1e-12)
    bent = exact @ (np.eye(3) + rng.normal(0, 3e-3, (3, 3)))
    found = symmetrised(bent, cell)
    # It is one only if the metric is; a bent one is refused.
    np.testing.assert_allclose(cell.with_matrix(found).parameters, parameters_from_matrix(bent), rtol=0.02)
    assert same_orientation(found, exact, cell, tolerance_deg=0.5)[0]
    if n_point > 1:
        with pytest.raises(BadCell):
            cell.with_matrix(bent)
