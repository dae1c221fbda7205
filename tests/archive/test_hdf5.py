"""What is written in memory has the bytes that HDF5's own closing would leave, under every HDF5."""

import netCDF4
import numpy as np

import tsdyn
from tests.cases import FEW, small
from tsdyn.archive import hdf5


def first_block(content):
    """The first block of an HDF5 file of version 2 or 3 without its checksum, and the checksum."""
    assert content[:4] == b"\x89HDF"
    assert content[8] >= 2
    end = 12 + 4 * content[9]
    return content[:end], int.from_bytes(content[end : end + 4], "little")


def test_the_checksum_is_that_of_jenkins():
    """The value that his own test program prints; the text ends within a block of 12 bytes."""
    assert hdf5.lookup3(b"Four score and seven years ago") == 0x17770551


def test_a_file_that_the_library_closed_keeps_its_bytes_and_a_wrong_checksum_is_put_right(tmp_path):
    with netCDF4.Dataset(tmp_path / "closed.nc", "w") as nc:
        nc.createDimension("x", 3)
        nc.createVariable("v", "f8", ("x",))[:] = np.arange(3.0)
    content = (tmp_path / "closed.nc").read_bytes()
    block, checksum = first_block(content)
    assert hdf5.lookup3(block) == checksum
    for spoilt in (checksum, checksum ^ 1):
        image = np.frombuffer(content, np.uint8).copy()
        image[len(block) : len(block) + 4] = np.frombuffer(spoilt.to_bytes(4, "little"), np.uint8)
        hdf5.seal(image)
        assert image.tobytes() == content


def test_an_archive_that_was_made_in_memory_has_the_checksum_of_its_first_block(tmp_path):
    """HDF5 before 2.0 gives an image with another one, which no HDF5 opens."""
    tsdyn.run(small(**FEW), tmp_path / "run")
    block, checksum = first_block((tmp_path / "run" / "archive.nc").read_bytes())
    assert hdf5.lookup3(block) == checksum
