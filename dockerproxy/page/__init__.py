"""The page in the browser: the state of the daemon, rendered here, complete without JavaScript.

`site` has the handlers, `sign_in` the viewers, `actions` what administrators may do. `views` and `charts` make what the
templates show of the documents that `dockerproxy.admin.overview` returns; they are pure. jinja2 and the templates are
loaded when the page is first asked for (`rendering`).
"""
