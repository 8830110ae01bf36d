"""All benchmarks, one after the other: `python -m benchmarks`."""

from benchmarks import footprint, in_process, over_http

in_process.main()  # first: it measures without a telemetry SDK set up
footprint.main()
over_http.main()
