import logging
def get_logger(**b):
    class L:
        def warning(self, e, **k): logging.getLogger("koan_ray").warning("%s %s", e, k)
        info=error=debug=warning
    return L()
