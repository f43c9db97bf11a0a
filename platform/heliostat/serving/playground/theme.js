// Sets the colours chosen earlier before the page is drawn; app.js lets one choose.
"use strict";

try {
  const chosen = localStorage.getItem("heliostat-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked: the system's colours it is.
}
