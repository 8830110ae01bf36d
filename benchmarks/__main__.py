"""All benchmarks, one after the other: `python -m benchmarks`."""

from benchmarks import footprint, in_process, over_http, telemetry

in_process.main()  # first: it measures without a telemetry SDK set up
telemetry.main()
footprint.main()
over_http.main()
