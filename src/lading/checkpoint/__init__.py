"""What is on disk: headers, names of files, bytes. torch is imported only to open a torch file.

header        the safetensors header as a value: bytes in, bytes out
files         the one place that opens files to read them
writers       the one that opens files to write them
folder        which files of a folder are the checkpoint
sources       Source, Checkpoint and the readers of their bytes
torch_files   the same of torch's own files
index         open_checkpoint, which puts them together
output        a folder that appears whole
outline       which files an export writes, byte by byte where the original's are known
"""

from lading.checkpoint.files import (
    ByteReader,
    read_header,
    read_header_bytes,
    read_json,
)
from lading.checkpoint.header import (
    Header,
    TensorInfo,
    encode_header,
    header_length,
    parse_header,
    storage_shape,
)
from lading.checkpoint.index import open_checkpoint
from lading.checkpoint.outline import Outline, outline_like, outline_new
from lading.checkpoint.output import OutputFolder, check_output_folder
from lading.checkpoint.sources import Checkpoint, Reader, Source, source_of, sources_of
from lading.checkpoint.writers import FileWriter, check_output, copy_file, write_json

__all__ = [
    "ByteReader",
    "Checkpoint",
    "FileWriter",
    "Header",
    "Outline",
    "OutputFolder",
    "Reader",
    "Source",
    "TensorInfo",
    "check_output",
    "check_output_folder",
    "copy_file",
    "encode_header",
    "header_length",
    "open_checkpoint",
    "outline_like",
    "outline_new",
    "parse_header",
    "read_header",
    "read_header_bytes",
    "read_json",
    "source_of",
    "sources_of",
    "storage_shape",
    "write_json",
]
