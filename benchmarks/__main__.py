"""All benchmarks, run in sequence by `python -m benchmarks`."""

from benchmarks import adaptive, footprint, in_process, middleware, over_http, stores, telemetry

in_process.main()  # runs first, because it measures without a telemetry SDK
middleware.main()
telemetry.main()
footprint.main()
over_http.main()
stores.main()
adaptive.main()
