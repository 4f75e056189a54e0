# Serves a bundle that is mounted at /model; see docs/serving.md.
FROM python:3.11-slim

# CPU-only PyTorch is a tenth of the size of the default one
COPY constraints.txt pyproject.toml README.md LICENSE /build/
COPY src /build/src
RUN pip install --no-cache-dir uv \
    && grep -v '^torch' /build/constraints.txt > /tmp/constraints.txt \
    && uv pip install --system --no-cache --torch-backend cpu --constraint /tmp/constraints.txt "/build[serve]" \
    && pip uninstall --yes uv \
    && rm -rf /build /tmp/constraints.txt \
    && useradd --no-create-home --uid 10001 pixelplay

USER 10001
# nothing is written: not even caches of bytecode or fonts
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME=/tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["pixelplay", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000", "--token-file", "/run/secrets/token"]
