# docker build -t gpt2-fastapi --build-arg TORCH_INDEX_URL=$TORCH_CPU_INDEX .
# docker run -p 8000:8000 -v gpt2-cache:/var/cache/huggingface gpt2-fastapi

FROM python:3.12-slim AS build
# Empty: PyPI's torch, which brings CUDA. PyTorch's CPU index makes the image several GB smaller.
ARG TORCH_INDEX_URL=""
COPY requirements.txt ./
# The environment gets no pip of its own: it is copied whole into the final image.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements.txt

FROM python:3.12-slim
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    MODEL_NAME=gpt2 \
    PORT=8000
RUN useradd --create-home --uid 1000 app \
    && mkdir -p "$HF_HOME" \
    && chown app "$HF_HOME"
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY main.py models.py neutral_values.py ./
COPY engine/ engine/
COPY backends/ backends/
COPY serving/ serving/
COPY static/ static/
COPY gpt2-tales/ gpt2-tales/
USER app
VOLUME /var/cache/huggingface
EXPOSE 8000
# /ready, not /health: a container is healthy once it takes requests. http.client, since
# urllib would go through a proxy that the environment names.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"]
# The command of the Procfile; exec makes uvicorn the process that `docker stop` signals.
CMD ["sh", "-c", "exec env MODEL_NAME=${MODEL_NAME:-gpt2} uvicorn main:app --host 0.0.0.0 --port $PORT --timeout-graceful-shutdown 25"]
