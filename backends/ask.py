"""What is asked of another server in one request, and how that becomes several."""

from dataclasses import dataclass, replace
from typing import Any

from backends.dialect import Route


@dataclass(frozen=True)
class Ask:
    """One request to the other server. first: the first of the generation's choices that are its
    own."""

    route: Route
    body: dict[str, Any]
    first: int
    num_choices: int

    def split(self) -> list["Ask"]:
        """A request for each prompt; of a single prompt, for each choice."""
        prompts = self.body.get("prompt")
        if isinstance(prompts, list) and len(prompts) > 1:
            bodies = [self.body | {"prompt": prompt} for prompt in prompts]
        else:
            bodies = [self.body | {"n": 1} for _ in range(self.num_choices)]
            if "seed" in self.body:  # the same would make the same text
                bodies = [
                    body | {"seed": (body["seed"] + at) % 2**63} for at, body in enumerate(bodies)
                ]
        size = self.num_choices // len(bodies)
        return [
            replace(self, body=body, first=self.first + size * at, num_choices=size)
            for at, body in enumerate(bodies)
        ]
