"""What is on disk: headers, names of files, bytes. torch is imported only to open a torch file.

header        the safetensors header as a value: bytes in, bytes out
files         the one place that opens files
folder        which files of a folder are the checkpoint
sources       Source, Checkpoint and the readers of their bytes
torch_files   the same of torch's own files
index         open_checkpoint, which puts them together
"""

from lading.checkpoint.files import (
    ByteReader,
    FileWriter,
    check_output,
    copy_file,
    read_header,
    read_json,
    write_json,
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
from lading.checkpoint.sources import Checkpoint, Reader, Source

__all__ = [
    "ByteReader",
    "Checkpoint",
    "FileWriter",
    "Header",
    "Reader",
    "Source",
    "TensorInfo",
    "check_output",
    "copy_file",
    "encode_header",
    "header_length",
    "open_checkpoint",
    "parse_header",
    "read_header",
    "read_json",
    "storage_shape",
    "write_json",
]
