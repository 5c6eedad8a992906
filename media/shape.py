"""Shapes with colours, by Shap-E."""

from dataclasses import replace
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from media.diffusion import DiffusionMaker
from media.loading import from_cache_or_hub, pick_device
from media.mesh import Mesh, encode_glb, encode_ply
from media.messages import Made, OnStep, RefusedFields

ENCODERS = {"model/gltf-binary": encode_glb, "application/x-ply": encode_ply}
GRID_SIZE = 128  # as the pipeline has it
QUERY_POINTS = 4096  # of the grid that are looked at in one step


class ShapeMaker(DiffusionMaker):
    """source: a folder or a Hugging Face id. Raises ValueError for a pipeline of another kind."""

    def __init__(self, source: str):
        dtype = pick_device()[1]
        pipeline = from_cache_or_hub(DiffusionPipeline.from_pretrained, source, dtype=dtype)
        if not hasattr(pipeline, "shap_e_renderer"):
            raise ValueError(f"{type(pipeline).__name__} is no Shap-E pipeline")
        super().__init__(pipeline)
        loaded = self.loaded
        defaults = loaded.defaults | {"grid_size": GRID_SIZE}
        self.loaded = replace(loaded, takes=loaded.takes | {"grid_size"}, defaults=defaults)
        pipeline.shap_e_renderer.mesh_decoder.register_forward_hook(refuse_nothing)

    def make(self, fields: dict[str, Any], on_step: OnStep) -> Made:
        """A mesh in the `media_type` of the fields. Raises RefusedFields where nothing has a
        surface."""
        num_queries = -(-(fields["grid_size"] ** 3) // QUERY_POINTS)
        num_done = num_steps = 0

        def tell_of_diffusion(step: int, of: int | None, preview: Any = None) -> None:
            nonlocal num_done, num_steps
            num_done, num_steps = step, of or 0
            on_step(num_done, num_steps + num_queries)

        def tell_of_query(*_: Any) -> None:
            nonlocal num_done
            # Those for colours come on top of what is reckoned with.
            num_done = min(num_done + 1, num_steps + num_queries)
            on_step(num_done, num_steps + num_queries)

        renderer = self.pipeline.shap_e_renderer
        latents = self.run(fields, tell_of_diffusion, output_type="latent").images
        hook = renderer.mlp.register_forward_hook(tell_of_query)
        try:
            found = renderer.decode_to_mesh(
                latents, self.device, fields["grid_size"], query_batch_size=QUERY_POINTS
            )
        finally:
            hook.remove()
        colours = [found.vertex_channels[each].float().cpu().numpy() for each in "RGB"]
        mesh = Mesh(
            positions=found.verts.float().cpu().numpy(),
            colours=np.stack(colours, 1),
            triangles=found.faces.cpu().numpy(),
        )
        return Made(ENCODERS[fields["media_type"]](mesh), fields["media_type"])


def refuse_nothing(_decoder: Any, _given: Any, mesh: Any) -> None:
    """Raises RefusedFields for a mesh without vertices, over which the renderer would stumble."""
    if not len(mesh.verts):
        raise RefusedFields("Nothing with a surface came of this prompt; try another seed")
