"""Write the table of the demo's data: images of solar cells, graded by defects.

The package elpv-dataset contains 2,624 electroluminescence images of solar cells and a `labels.csv` with the
probability of a defect according to experts: 0, 1/3, 2/3 or 1. The table has the path and the grade of each
image; the images stay where the package has them.

Usage: python demo/solar_cells.py TABLE.csv
"""

import csv
import importlib.util
import os
import sys

GRADES = {
    "0.0": "0 intact",
    "0.3333333333333333": "1 doubtful",
    "0.6666666666666666": "2 suspect",
    "1.0": "3 defective",
}


def main(table: str) -> None:
    """Write the table; exit where the images are not installed."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        sys.exit("error: elpv-dataset is not installed; run `make demo` or pip install 'pixelplay[demo]'")
    data = os.path.join(os.path.dirname(package.origin), "data")
    with open(os.path.join(data, "labels.csv"), encoding="utf-8") as source:
        rows = [line.split() for line in source if line.strip()]
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([os.path.join(data, path), GRADES[probability]] for path, probability, _ in rows)
    print(f"{table}: {len(rows):,} solar cells in {len(GRADES)} grades")


if __name__ == "__main__":
    main(sys.argv[1])
