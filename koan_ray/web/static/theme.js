// Loaded before anything is drawn, so that a chosen theme does not flash. The rest of it is in appearance.js.
(() => {
  try {
    const theme = localStorage.getItem("koan.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be forbidden; then the system's preference counts.
  }
})();
