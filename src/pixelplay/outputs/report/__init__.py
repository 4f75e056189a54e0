"""RUN → one HTML file that people open: how good, where wrong, where it looked, what to do next."""
