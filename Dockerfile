# `lite serve` on a CPU, without torch. Nothing of a checkpoint or an artifact is in the image: mount yours when it runs.
#
#   docker build -t llava-rad-lite .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/artifact:/artifact:ro" -v "$PWD/key:/key:ro" llava-rad-lite
FROM python:3.11-slim

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY lite lite
RUN pip install --no-cache-dir -c constraints.txt '.[cpu,dicom,serve]' && rm -rf /source

# What runs has no rights, and needs no place to write but for films that are spooled.
RUN useradd --system --no-create-home lite
USER lite
WORKDIR /
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "lite", "serve"]
CMD ["/artifact", "--host", "0.0.0.0", "--api-key-file", "/key"]
