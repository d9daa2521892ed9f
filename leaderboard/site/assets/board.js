/* Tables of the board: sorting, searching and, where they are long, paging, by DataTables. */
"use strict";

(function () {
  const LONG = 100; // rows of one page

  /* What scrolls is the table alone, not its search field; it takes the keyboard's focus and the name. */
  function scrolls(table) {
    const outer = table.closest(".scroll");
    const inner = table.closest(".dt-layout-table");
    if (!outer || !inner) {
      return;
    }
    for (const name of ["tabindex", "role", "aria-label"]) {
      inner.setAttribute(name, outer.getAttribute(name));
      outer.removeAttribute(name);
    }
    inner.classList.add("scroll");
    outer.classList.remove("scroll");
  }

  for (const table of document.querySelectorAll("table.board")) {
    const rows = table.tBodies[0].rows.length;
    const name = table.caption.textContent;
    new DataTable(table, {
      autoWidth: false,
      order: [],
      orderCellsTop: true,
      paging: rows > LONG,
      pageLength: LONG,
      lengthChange: false,
      layout: {
        topStart: "search",
        topEnd: "info",
        bottomStart: null,
        bottomEnd: rows > LONG ? "paging" : null,
      },
      columnDefs: [
        { targets: "unsorted", orderable: false },
        { targets: "up", type: "num", orderSequence: ["asc", "desc"] },
        { targets: "num", type: "num", orderSequence: ["desc", "asc"] },
        { targets: "_all", orderSequence: ["asc", "desc"] },
      ],
      language: {
        search: "Search",
        info: rows > LONG ? "_START_ to _END_ of _TOTAL_ rows" : "_TOTAL_ rows",
        infoEmpty: "no row",
        infoFiltered: "of _MAX_",
        zeroRecords: "No row matches.",
      },
    });
    const search = table.closest(".dt-container").querySelector("input[type=search]");
    search.setAttribute("aria-label", "Search " + name);
    scrolls(table);
  }
})();
