// Whether a mouse, pen or finger is down: what moves away between press and release is not clicked.

const waiting = new Map();
let isPressed = false;

// A tap presses the mouse only once the finger is up again.
for (const name of ["pointerdown", "mousedown"]) document.addEventListener(name, () => { isPressed = true; }, true);
for (const name of ["pointerup", "pointercancel", "mouseup"]) {
  document.addEventListener(name, () => {
    isPressed = false;
    setTimeout(() => { // after the click
      if (isPressed) return; // pressed again: the next release is as good
      const acts = [...waiting.values()];
      waiting.clear();
      for (const act of acts) act();
    });
  }, true);
}
// What is released elsewhere, such as outside the window, tells nobody.
window.addEventListener("blur", () => document.dispatchEvent(new Event("pointercancel")));

/** Act now, or as soon as nothing is pressed and what was clicked has had its way; of one `owner` only the last act is done. */
export function whenReleased(act, owner) {
  if (isPressed) waiting.set(owner, act);
  else act();
}
