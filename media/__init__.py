"""Sounds, pictures, videos and shapes, each made by a model in a process of its own.

In the service's process: `MediaBackend` (backend.py) is all that a route knows of such a model. It
looks at the prompt and the fields, and queues a `Job` (job.py) at its `Worker` (worker.py), whose
thread hands one job at a time to the process, starts that again when it has died, and tells jobs
how they get on.

In the model's process: `serve` (process.py) loads a `Maker` (audio.py, image.py, video.py,
shape.py) and makes what it is ordered. messages.py has what the two say to each other.
Nothing on that side imports anything of this project but its neighbours: the process has room for
one model and no service.
"""
