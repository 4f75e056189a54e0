"""Classify images with an exported model: python predict_onnx.py model.onnx IMAGES... > out.csv"""

import csv
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
classes, prep = json.loads(meta["classes"]), json.loads(meta["preprocessing"])
columns, rows = size = prep["input_size"][::-1]
table = csv.writer(sys.stdout, lineterminator="\n")
table.writerow(["path", "prediction", "probability", *(f"prob_{name}" for name in classes)])
for path in sys.argv[2:]:
    try:
        image: Image.Image = Image.open(path)
        image.draft(None, (2 * max(rows, columns),) * 2)  # decodes a large JPEG at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits
            values = np.clip(np.array(image) * (255 / prep["max_value"]), 0, 255)
            image = Image.fromarray(np.rint(values).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.composite(image, Image.new("RGBA", image.size, "white"), image.getchannel("A"))
        (width, height), scales = image.size, (columns / image.width, rows / image.height)
        left, top = (prep["fit"] == "crop") * np.maximum(0, image.size - np.divide(size, max(scales))) / 2
        side = min(scales) if prep["fit"] == "pad" else None
        part = (max(1, round(width * side)), max(1, round(height * side))) if side else (columns, rows)
        box, method = (left, top, width - left, height - top), Image.Resampling[prep["interpolation"].upper()]
        canvas = Image.new("RGB", (columns, rows), tuple(round(255 * value) for value in prep["mean"]))
        corner = (columns - part[0]) // 2, (rows - part[1]) // 2
        canvas.paste(image.convert("RGB").resize(part, method, box), corner)
        probs, (k,) = session.run(["probs", "prediction"], {"pixels": np.asarray(canvas)[None]})
        table.writerow([path, classes[k], *(f"{p:.6f}" for p in (probs[0, k], *probs[0]))])
    except Exception as error:  # an unreadable image is a row without values
        print(f"{path}: {error}", file=sys.stderr)
        table.writerow([path, *[""] * (len(classes) + 2)])
