"""What is counted of sounds, pictures, videos and shapes; imported only where there are any."""

from prometheus_client import Counter, Gauge, Histogram

from media.worker import Worker

JOB_SECONDS = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
LABELS = ["kind", "model_name"]


class MediaMetrics:
    """The figures of one model; `observe` is called by its worker."""

    RUNNING = Gauge("media_jobs_running", "Jobs being worked on, at most one.", LABELS)
    WAITING = Gauge("media_jobs_waiting", "Jobs in the queue.", LABELS)
    HEALTHY = Gauge("media_worker_healthy", "0 while the model's process is not there.", LABELS)
    ENDED = Counter(
        "media_jobs",
        "Jobs that were begun, by outcome: made, cancelled, refused, failed, died, stopped.",
        [*LABELS, "outcome"],
    )
    SECONDS = Histogram(
        "media_job_seconds", "Of a job that was begun, to its end.", LABELS, buckets=JOB_SECONDS
    )

    def __init__(self, kind: str, model_name: str):
        self.labels = (kind, model_name)

    def observe(self, outcome: str, seconds: float) -> None:
        """Counts a job that has ended. Called in the worker's thread."""
        self.ENDED.labels(*self.labels, outcome).inc()
        self.SECONDS.labels(*self.labels).observe(seconds)

    def watch(self, worker: Worker) -> None:
        """From now on a scrape reads the worker's own counts."""
        self.RUNNING.labels(*self.labels).set_function(lambda: worker.num_running)
        self.WAITING.labels(*self.labels).set_function(lambda: worker.num_waiting)
        self.HEALTHY.labels(*self.labels).set_function(lambda: worker.is_healthy)
