"""Our jobs inside the Ray dashboard: a module of its own, and a board for Grafana.

Ray's dashboard imports every package under ``ray/dashboard/modules`` and runs each module it finds in a process of its own.
`installation` puts a stub there, which imports `head` and swallows whatever goes wrong with that; `window` reads the engines
of the cluster when a page asks. All of it only reads, and shows neither contexts nor results: whoever may open Ray's
dashboard sees what jobs there are and how they fare.

Ray calls this no public interface. It was written for Ray 2.60, and everything that it relies on is imported in `head`.
"""
