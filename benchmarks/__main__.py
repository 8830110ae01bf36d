"""All benchmarks, one after the other: `python -m benchmarks`."""

from benchmarks import footprint, in_process

in_process.main()
footprint.main()
