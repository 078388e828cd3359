// A table of any length of which only the rows in sight exist. Rows are reused by id, so that focus stays where it is.

const AHEAD = 8; // rows above and below what is in sight

export class VirtualRows {
  /**
   * scroll: what scrolls. body: its `<tbody>`. size(): how many rows there are. key(place): the id of a row.
   * make(): a row; it has `element` and `update(place)`. atEnd(): the last row is near.
   */
  constructor({ scroll, body, size, key, make, atEnd }) {
    Object.assign(this, { scroll, body, size, key, make, atEnd });
    this.shown = new Map();
    this.frame = 0;
    this.rowHeight = 40;
    this.draw = this.draw.bind(this);
    this.later = this.later.bind(this);
    scroll.addEventListener("scroll", this.later, { passive: true });
    this.resizing = new ResizeObserver(() => { this.measure(); this.later(); });
    this.resizing.observe(scroll);
  }

  measure() {
    const height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    if (height > 0) this.rowHeight = height;
  }

  /** Draw at the next frame. */
  later() {
    if (!this.frame) this.frame = requestAnimationFrame(this.draw);
  }

  /** Keep what is in sight where it is while rows are added above it. */
  shift(nRows) {
    if (this.scroll.scrollTop >= this.rowHeight) this.scroll.scrollTop += nRows * this.rowHeight;
  }

  draw() {
    this.frame = 0;
    const size = this.size();
    const { scrollTop, clientHeight } = this.scroll;
    const first = Math.max(0, Math.min(size, Math.floor(scrollTop / this.rowHeight)) - AHEAD);
    const end = Math.min(size, Math.ceil((scrollTop + clientHeight) / this.rowHeight) + AHEAD);
    this.body.style.paddingTop = `${first * this.rowHeight}px`;
    this.body.style.paddingBottom = `${(size - end) * this.rowHeight}px`;
    const wanted = [];
    for (let place = first; place < end; place += 1) wanted.push(this.key(place));
    this._drop(new Set(wanted));
    let before = null;
    wanted.forEach((id, offset) => {
      let row = this.shown.get(id);
      if (!row) {
        row = this.make();
        this.shown.set(id, row);
      }
      row.update(first + offset);
      const next = before ? before.nextSibling : this.body.firstChild;
      if (next !== row.element) this.body.insertBefore(row.element, next);
      before = row.element;
    });
    if (end >= size - 2 * AHEAD) this.atEnd();
  }

  _drop(wanted) {
    for (const [id, row] of this.shown) {
      if (wanted.has(id)) continue;
      row.element.remove();
      this.shown.delete(id);
    }
  }

  /** Move the focus to the link of a row, which is scrolled into sight first. */
  focus(place) {
    const top = place * this.rowHeight;
    const { scrollTop, clientHeight } = this.scroll;
    const head = this.body.offsetTop;
    if (top < scrollTop) this.scroll.scrollTop = top;
    else if (top + this.rowHeight > scrollTop + clientHeight - head) this.scroll.scrollTop = top + this.rowHeight - clientHeight + head;
    this.draw();
    this.shown.get(this.key(place))?.element.querySelector("a")?.focus({ preventScroll: true });
  }

  close() {
    cancelAnimationFrame(this.frame);
    this.resizing.disconnect();
    this.scroll.removeEventListener("scroll", this.later);
  }
}
