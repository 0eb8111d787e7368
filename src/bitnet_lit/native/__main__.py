"""`python -m bitnet_lit.native` compiles the C++ for this machine ahead of its first use; `make install` runs it."""

from __future__ import annotations

from bitnet_lit.inference.engines.cpu.native import ENGINE
from bitnet_lit.native import build
from bitnet_lit.native.library import TRAINING


def main() -> None:
    """Compile the libraries that are missing, and say of each whether it is there."""
    for source in (TRAINING, ENGINE):
        try:
            build.library(source)
        except build.NoCompilerError as error:
            print(f"{source.name}: {error}: PyTorch computes instead")
        else:
            print(f"{source.name}: compiled for this processor")


if __name__ == "__main__":
    main()
