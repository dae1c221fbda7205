"""Archives: what runs and sweeps leave on disk, written whole or not at all and opened lazily as labelled Datasets.

The names that other parts of the library use; `tsdyn.open`, `tsdyn.layer` and `tsdyn.select` are those from here.
Imports no torch.
"""

from tsdyn.netcdf import bytes_per_epoch as bytes_per_epoch
from tsdyn.netcdf import write_dataset as write_dataset
from tsdyn.reading import open as open
from tsdyn.run_directory import ARCHIVE as ARCHIVE
from tsdyn.run_directory import EXPERIMENT as EXPERIMENT
from tsdyn.run_directory import SEGMENTS as SEGMENTS
from tsdyn.run_directory import RunDirectory as RunDirectory
from tsdyn.run_directory import claim as claim
from tsdyn.run_directory import segments as segments
from tsdyn.selecting import experiment_of as experiment_of
from tsdyn.selecting import layer as layer
from tsdyn.selecting import lowest_layer as lowest_layer
from tsdyn.selecting import select as select
from tsdyn.selecting import swept_dimensions as swept_dimensions
from tsdyn.sweep_directory import SWEEP as SWEEP
from tsdyn.sweep_directory import label as label
from tsdyn.sweep_directory import point_name as point_name
from tsdyn.sweep_directory import sweep_points as sweep_points
from tsdyn.sweep_directory import write_sweep as write_sweep
from tsdyn.whole_files import ArchiveError as ArchiveError
from tsdyn.whole_files import DirectoryError as DirectoryError
from tsdyn.whole_files import local_path as local_path
from tsdyn.whole_files import write_text as write_text
from tsdyn.wrong_numbers import WrongNumbersWarning as WrongNumbersWarning
